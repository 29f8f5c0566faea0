"""Perplexity, held against log-softmax written out, and against models whose perplexity is known beforehand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from evaluate_samples import tiny_model  # type: ignore[import-not-found]

from train.errors import NonFiniteLossError, UserError
from train.evaluate.perplexity import Score, document_end, document_start, score, windows

EOD = 4
TEXTS = ["the cat sees a dog", "猫 は 犬 を 見る", "sun moon sun", "", "the " * 30 + "cat"]


def written_out(model: Any, ids: list[int], *, window: int, stride: int) -> float:
    """-log p of each token but the first: softmax by hand, one token and one forward pass at a time."""
    nats = 0.0
    for place in range(1, len(ids)):
        begin = 0
        while begin + window <= place:  # the first window that reaches it
            begin += stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1].double()
        nats += math.log(sum(math.exp(value) for value in logits.tolist())) - float(logits[ids[place]])
    return nats


def test_one_window_per_document(words: Any) -> None:
    model = tiny_model(words, positions=64)
    found = score(model, words, TEXTS, window=64, stride=32, batch_size=3)
    ids = [[EOD, *words(text, add_special_tokens=False)["input_ids"]] for text in TEXTS if text]
    nats = sum(written_out(model, one, window=64, stride=32) for one in ids)
    tokens = sum(len(one) - 1 for one in ids)
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    numbers = found.numbers()
    assert numbers["tokens"] == tokens == 5 + 5 + 3 + 31
    assert numbers["bytes"] == text_bytes
    assert (numbers["documents"], numbers["empty_documents"], numbers["unknown_tokens"]) == (4, 1, 0)
    assert numbers["perplexity_per_token"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert numbers["perplexity_per_byte"] == pytest.approx(math.exp(nats / text_bytes), rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(nats / text_bytes / math.log(2), rel=1e-5)
    assert numbers["loss_per_token"] == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize(("window", "stride", "batch_size"), [(8, 4, 1), (8, 1, 5), (8, 7, 64), (32, 16, 2)])
def test_sliding_windows(words: Any, window: int, stride: int, batch_size: int) -> None:
    model = tiny_model(words)
    found = score(model, words, TEXTS, window=window, stride=stride, batch_size=batch_size)
    ids = [[EOD, *words(text, add_special_tokens=False)["input_ids"]] for text in TEXTS if text]
    expected = sum(written_out(model, one, window=window, stride=stride) for one in ids)
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_every_token_is_scored_once_with_enough_before_it() -> None:
    source = random.Random(1)
    for _ in range(300):
        length, window = source.randint(1, 60), source.randint(2, 20)
        stride = source.randint(1, window - 1)
        scored: list[int] = []
        for begin, end, scored_from in windows(length, window=window, stride=stride):
            assert end - begin <= window and begin < scored_from < end
            assert scored_from - begin >= min(scored_from, window - stride)
            scored += range(scored_from, end)
        assert scored == list(range(1, length))


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(words: Any, bytes_: Any) -> None:
    """All tokens equally likely: bits per byte are log2 of the vocabulary times tokens per byte."""
    text = "the cat sees a dog"
    for tokenizer in (words, bytes_):
        model = tiny_model(tokenizer)
        torch.nn.init.zeros_(model.lm_head.weight)
        numbers = score(model, tokenizer, [text], window=32, stride=16).numbers()
        size, tokens = len(tokenizer), len(tokenizer(text)["input_ids"])
        assert numbers["perplexity_per_token"] == pytest.approx(size, rel=1e-5)
        assert numbers["bits_per_byte"] == pytest.approx(tokens * math.log2(size) / 18, rel=1e-5)
        assert numbers["perplexity_per_byte"] == pytest.approx(size ** (tokens / 18), rel=1e-5)


def test_documents_do_not_see_each_other(words: Any) -> None:
    model = tiny_model(words)
    together = score(model, words, ["the cat", "sees a dog"], window=32, stride=16)
    alone = [score(model, words, [text], window=32, stride=16).nats for text in ("the cat", "sees a dog")]
    joined = score(model, words, ["the cat sees a dog"], window=32, stride=16)
    assert together.nats == pytest.approx(sum(alone), rel=1e-5)
    assert abs(together.nats - joined.nats) > 1e-3


def test_ends_are_scored_when_asked_for(words: Any) -> None:
    model = tiny_model(words)
    without = score(model, words, ["the cat"], window=32, stride=16)
    with_ends = score(model, words, ["the cat"], window=32, stride=16, score_ends=True)
    assert (with_ends.tokens, with_ends.text_bytes) == (3, 7)
    ids = torch.tensor([[EOD, *words("the cat")["input_ids"]]])
    with torch.no_grad():
        end = -float(model(ids).logits[0, -1].log_softmax(-1)[EOD])
    assert with_ends.nats - without.nats == pytest.approx(end, rel=1e-4)


def test_bfloat16_is_scored_in_float32(words: Any) -> None:
    model = tiny_model(words)
    full = score(model, words, TEXTS, window=32, stride=16).numbers()["loss_per_token"]
    half = score(model.to(torch.bfloat16), words, TEXTS, window=32, stride=16)
    assert half.numbers()["loss_per_token"] == pytest.approx(full, rel=0.02)
    ids = torch.tensor([[EOD, *words(TEXTS[0])["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    expected = sum(float(-logits[n].log_softmax(-1)[ids[0, n + 1]]) for n in range(5))
    assert score(model, words, TEXTS[:1], window=32, stride=16).nats == pytest.approx(expected, rel=1e-6)


def test_what_stands_before_a_document(words: Any, bytes_: Any) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    assert document_start(words) == document_end(words) == EOD
    assert document_start(words, "</s>") == 2
    with pytest.raises(UserError, match="--document_start '<none>' is no token"):
        document_start(words, "<none>")
    raw = words.backend_tokenizer.from_str(words.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert document_start(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")) == 1
    bare = bytes_.backend_tokenizer.from_str(bytes_.backend_tokenizer.to_str().replace("<EOD>", "<END>"))
    assert document_start(PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")) == 2
    with pytest.raises(UserError, match="no end token"):
        document_start(PreTrainedTokenizerFast(tokenizer_object=bare))


def test_unknown_words_are_counted(words: Any) -> None:
    assert score(tiny_model(words), words, ["the zebra sees"], window=32, stride=16).unknown_tokens == 1


def test_nothing_to_score_and_nan(words: Any) -> None:
    with pytest.raises(UserError, match="no text to score"):
        score(tiny_model(words), words, ["", " "], window=32, stride=16)
    with pytest.raises(NonFiniteLossError, match="NaN or 0"):
        Score(nats=math.nan, tokens=1, text_bytes=1).numbers()
    assert Score(nats=1e6, tokens=1, text_bytes=1).numbers()["perplexity_per_token"] == math.inf
