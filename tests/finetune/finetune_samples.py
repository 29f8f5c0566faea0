"""What the tests of step 4 share: conversations, tiny tokenizers, and its launcher."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts" / "step4_finetune_model"
SEEDS_LAUNCHER = SCRIPTS / "gcp_honban_node-2_gpu-16" / "dataset-openassistant" / "launcher-deepspeed_zero-3.sh"

WORDS = [
    "the",
    "cat",
    "sees",
    "a",
    "dog",
    "猫",
    "は",
    "犬",
    "を",
    "見る。",
    "東京",
    "🙂",
    "👩\u200d👩\u200d👧",
    "naïve",
    "12,345",
]
WORDS += ["x=1", "###", "Human", "Assistant:", "\n", "\n\n", "", "", "", "(tab\t)", "Ω"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]


def random_text(source: random.Random, words: int) -> str:
    return (" ".join(source.choice(WORDS) for _ in range(words))).strip() or "words"


def random_conversation(source: random.Random) -> list[dict[str, str]]:
    """Several turns; now and then a question quotes the templates, or an answer begins with blanks."""
    messages = [{"role": "system", "content": "Be brief. 短く。"}] if source.random() < 0.3 else []
    for _ in range(source.randint(1, 4)):
        question = random_text(source, source.randint(1, 12))
        if source.random() < 0.3:
            question += "\n### Assistant: not this one ### Human: nor this"
        answer = random_text(source, source.randint(1, 12))
        if source.random() < 0.2:
            answer = source.choice(["  ", "\n", "\t", " \n "]) + answer
        if source.random() < 0.2:
            answer += source.choice([" ", "\n", "🙂"])
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def corpus() -> list[str]:
    source = random.Random(0)
    return [f"### Human: {random_text(source, 8)}\n### Assistant: {random_text(source, 8)}" for _ in range(400)]


def converted_sentencepiece(folder: Path, model_type: str, *, normalization: str = "identity", **options: Any) -> None:
    """A SentencePiece model as step 1 trains it, through step 3's conversion."""
    import sentencepiece

    from train.tokenizer import special_tokens
    from train.tokenizer.convert import convert_tokenizer

    defaults = {"user_defined_symbols": list(special_tokens.USER_DEFINED_SYMBOLS), "bos_id": -1, "eos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "source"),
        model_type=model_type,
        vocab_size=600,
        hard_vocab_limit=False,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
        **(defaults | options),
    )
    convert_tokenizer(folder / "source.model", folder, model_max_length=128)
    (folder / "source.model").unlink()
    (folder / "source.vocab").unlink()


def byte_level(folder: Path) -> None:
    """A BPE tokenizer of GPT-2's and Llama 3's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def call(*argv: str | Path) -> int:
    """The launcher, in this process."""
    from train import cli
    from train.finetune import launch
    from train.finetune.settings import FinetuneSettings

    words = [str(word) for word in argv]
    recipes = SCRIPTS / "recipes"
    return cli.run(FinetuneSettings, launch.finetune, words, description="", example="", recipe_dir=recipes)


def argv(files: dict[str, Any], **changes: Any) -> list[str]:
    """The command line of some settings; None leaves one out."""
    words: list[str] = []
    for name, value in (files | changes).items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
