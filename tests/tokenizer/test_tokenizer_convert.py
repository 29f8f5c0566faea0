from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from train.errors import UserError, VerificationError
from train.tokenizer.convert import TOKENIZER_FILES, convert_tokenizer, read_model
from train.tokenizer.handover import corpus_texts
from train.tokenizer.parity import check_parity, compare, hard_cases

Both = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_nothing_differs_on_hard_cases_and_on_the_corpus(
    converted: Both, corpus: Path, model_type: str, normalization: str
) -> None:
    texts = [*hard_cases(), *corpus_texts([corpus])]
    report = check_parity(*converted(model_type, normalization), texts)
    assert report.texts == len(texts) > 4000
    assert report.passed
    assert (report.mismatched_ids, report.mismatched_decodes, report.first_difference) == (0, 0, "")


def test_nothing_differs_under_nfkc_without_nmt(converted: Both) -> None:
    assert check_parity(*converted("unigram", "nfkc"), hard_cases()).passed


@pytest.mark.parametrize("context", ["a{}b", "{}\u0301", "か{}\u3099", "{0}{0}\u0323\u0301 "])
def test_nothing_differs_on_code_points_of_all_planes(converted: Both, context: str) -> None:
    dense = [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000), *range(0x1D400, 0x1D800)]
    sparse = range(0x3400, 0x110000, 97)
    codes = sorted({code for code in (*dense, *sparse) if not 0xD800 <= code <= 0xDFFF})
    lines = ("".join(context.format(chr(code)) for code in codes[at : at + 32]) for at in range(0, len(codes), 32))
    assert check_parity(*converted(), lines).passed


def test_a_long_document_is_no_other_matter(converted: Both, corpus: Path) -> None:
    document = "\n".join(corpus_texts([corpus])) * 4
    assert len(document) > 400_000
    assert check_parity(*converted(), [document]).passed


@pytest.mark.parametrize("text", ["<unk>", "a<unk>b", "<0x41>", "\n<0x41>\n", "<s>", "x</s>y<EOD>", "\n\n"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_reserved_pieces_in_text_are_text_and_symbols_are_symbols(converted: Both, model_type: str, text: str) -> None:
    from transformers import AutoTokenizer

    model_file, folder = converted(model_type)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == processor.encode(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_the_folder_has_the_three_files_and_names_the_special_tokens(converted: Both) -> None:
    from transformers import AutoTokenizer

    model_file, folder = converted()
    assert sorted(file.name for file in folder.iterdir()) == sorted(TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == tokenizer.vocab_size == len(read_model(model_file).pieces)
    names = ("unk", "bos", "eos", "pad", "cls", "sep", "mask")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4, 5, 7]
    assert tokenizer.convert_tokens_to_ids("<EOD>") == 6
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(tokenizer("a")) == ["attention_mask", "input_ids"]


def test_special_tokens_can_be_left_out_of_decoded_text(converted: Both) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted()[1])
    ids = [1, *tokenizer.encode("the end"), 2, 6, 3, 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the end"


def test_the_stock_rounding_is_needed(corpus: Path, tmp_path: Path) -> None:
    """Without rounded scores equal splits come out differently: parity must see it."""
    prefix = tmp_path / "unrounded"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(prefix), vocab_size=1000, byte_fallback=True, minloglevel=2
    )
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_tokenizer(prefix.with_suffix(".model"), folder, model_max_length=512)
    texts = [left * first + right * second for left in "=-#* " for right in "=-#* " for first in range(1, 30)
             for second in (1, 5, 9, 40)]  # fmt: skip
    report = compare(prefix.with_suffix(".model"), folder, texts)
    assert report.mismatched_ids > 0
    assert report.mismatched_decodes == 0


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_models_trained_elsewhere_without_our_symbols_are_converted(
    corpus: Path, tmp_path: Path, model_type: str
) -> None:
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        vocab_size=1000,
        model_type=model_type,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_tokenizer(prefix.with_suffix(".model"), folder, model_max_length=512)
    assert check_parity(prefix.with_suffix(".model"), folder, ["the parser", "日本の①ｶﾞ", "a\r\nb", "<0x41>"]).passed
    named = json.loads((folder / "special_tokens_map.json").read_text())
    assert named["bos_token"] == "<s>"
    assert "pad_token" not in named


@pytest.mark.parametrize("literal_pieces", [("<u", "un", "nk", "k>"), ("<unk", "k>", "nk>")])
def test_a_vocabulary_that_covers_the_unknown_piece_does_not_confuse(
    tmp_path: Path, literal_pieces: tuple[str, ...], trained: Callable[..., Path]
) -> None:
    """Where no cut inside `<unk>` is safe, its score keeps it out."""
    model = read_model(trained("unigram", "identity"))
    present = {piece.piece for piece in model.pieces}
    for text in (*literal_pieces, *"<unk>"):
        if text not in present:
            model.pieces.add(piece=text, score=-5.0, type=1)
    model_file = tmp_path / "covered.model"
    model_file.write_bytes(model.SerializeToString())
    folder = tmp_path / "hf"
    folder.mkdir()
    convert_tokenizer(model_file, folder, model_max_length=512)
    assert check_parity(model_file, folder, ["<unk>", "a<unk>b<unk><unk>", "<unk", "unk>", *hard_cases()[:1500]]).passed


@pytest.mark.parametrize("model_type", ["word", "char"])
def test_other_model_types_are_refused(trained: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UserError, match=f"of type {model_type}, .*train with --model_type unigram or bpe"):
        convert_tokenizer(trained(model_type), tmp_path, model_max_length=512)
    assert not list(tmp_path.iterdir())


def test_bad_model_files_are_refused(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.model", tmp_path / "text.model"
    empty.touch()
    text.write_text("this is not a model")
    for file, message in (
        (tmp_path / "absent.model", "is missing: name the .model file"),
        (tmp_path, "is a folder, a SentencePiece model is expected"),
        (empty, "is not a SentencePiece model"),
        (text, "is not a SentencePiece model"),
    ):
        with pytest.raises(UserError, match=message):
            convert_tokenizer(file, tmp_path, model_max_length=512)


def test_a_length_is_positive(trained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_max_length is 0: give the longest sequence"):
        convert_tokenizer(trained(), tmp_path, model_max_length=0)


def damage(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "tokenizer.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(record)
    file.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def _swap_two_pieces(record: dict) -> None:
    vocabulary = record["model"]["vocab"]
    vocabulary[300], vocabulary[301] = vocabulary[301], vocabulary[300]


def _lose_the_first_space(record: dict) -> None:
    record["normalizer"]["normalizers"].pop(0)


def _keep_the_first_space(record: dict) -> None:
    record["decoder"]["decoders"].pop()


def _forget_to_compose(record: dict) -> None:
    steps = record["normalizer"]["normalizers"]
    steps[:] = [step for step in steps if step["type"] != "NFC"]


def _add_a_beginning(record: dict) -> None:
    record["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


@pytest.mark.parametrize(
    "change",
    [_swap_two_pieces, _lose_the_first_space, _keep_the_first_space, _forget_to_compose, _add_a_beginning],
)
def test_damage_is_caught(own_folder: tuple[Path, Path], change: Callable[[dict], None]) -> None:
    model_file, folder = own_folder
    damage(folder, change)
    with pytest.raises(VerificationError, match=r"does not tokenize like .* First difference: text \d+, "):
        check_parity(model_file, folder, hard_cases())


def test_the_first_difference_is_shown_in_its_context(own_folder: tuple[Path, Path]) -> None:
    model_file, folder = own_folder
    damage(folder, _lose_the_first_space)
    report = compare(model_file, folder, ["", "the parser"])
    assert (report.texts, report.mismatched_ids, report.mismatched_decodes) == (2, 1, 0)
    assert report.first_difference.startswith("text 2, piece 1, near 'the parser': SentencePiece ['▁the', ")
    assert report.as_dict()["passed"] is False


def test_a_decoding_difference_is_shown_in_its_context(own_folder: tuple[Path, Path]) -> None:
    model_file, folder = own_folder
    damage(folder, _keep_the_first_space)
    report = compare(model_file, folder, ["the parser"])
    assert (report.mismatched_ids, report.mismatched_decodes) == (0, 1)
    assert report.first_difference == (
        "text 1, decoded character 1: SentencePiece 'the parser', Hugging Face ' the parser'"
    )


def test_no_text_proves_nothing(converted: Both) -> None:
    with pytest.raises(VerificationError, match="no text to compare"):
        check_parity(*converted(), [])


def test_a_folder_without_a_tokenizer_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.json: convert the tokenizer into it first"):
        check_parity(trained(), tmp_path, ["a"])


def test_hard_cases_are_many_valid_and_the_same_each_time() -> None:
    cases = hard_cases()
    assert cases == hard_cases()
    assert len(cases) > 4000
    assert "" in cases
    assert all(text.encode() is not None for text in cases)
