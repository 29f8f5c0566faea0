"""A conversation in the terminal: what is shown is what was said, and what was said is remembered."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import verify
from train.finetune import chat_template, masks
from train.generate import decode
from train.generate.chat import Stream, chat


def typed(lines: Iterable[str]) -> Callable[[str], str]:
    waiting = iter(lines)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.fixture
def loaded(base_model: Path) -> tuple[Any, Any]:
    model, tokenizer = verify.load(base_model)
    tokenizer.chat_template = chat_template.build("### Human:", "### Assistant:")
    return model, tokenizer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the model was given, call after call."""
    seen: list[list[int]] = []
    true = decode.decode
    monkeypatch.setattr(decode, "decode", lambda model, ids, *a, **b: seen.extend(ids) or true(model, ids, *a, **b))
    return seen


TEXTS = ["the cat", " 猫は犬を見る。\n\nnaïve 🙂👩\u200d👩\u200d👧 12,345 ", "日本語🙂", "\n", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_streamed_is_the_whole_answer(tokenizer: Any, text: str) -> None:
    """Token after token, bytes of one character in several tokens too; nothing half is ever shown."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    out = io.StringIO()
    stream = Stream(tokenizer, out)
    stream.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token_id in ids:
        stream.put(torch.tensor([token_id]))
        assert "\ufffd" not in out.getvalue()
    stream.end()
    assert out.getvalue() == tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()


def test_turns_are_remembered_until_they_are_forgotten(loaded: Any, asked: list[list[int]]) -> None:
    model, tokenizer = loaded
    out = io.StringIO()
    lines = ["the cat", "", "犬", "/new", "the dog", "/exit", "never asked"]
    chat(
        model, tokenizer, decode.Drawing(max_new_tokens=6), ends=[2], system="Be brief.", read=typed(lines), stream=out
    )
    said = out.getvalue().splitlines()
    assert "(forgotten)" in said
    system = {"role": "system", "content": "Be brief."}
    (first,) = decode.decode(model, [asked[0]], decode.Drawing(max_new_tokens=6), ends=[2], pad_id=3)
    answer = tokenizer.decode(first, skip_special_tokens=True).strip()
    assert out.getvalue().startswith(answer)
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": answer}]
    expected = [
        [system, turns[0]],
        [system, *turns, {"role": "user", "content": "犬"}],
        [system, {"role": "user", "content": "the dog"}],
    ]
    assert asked[:3] == [masks.prompt_ids(tokenizer, one) for one in expected]
    assert len(asked) == 4  # three turns, and the one above


def test_the_oldest_turns_go_when_it_grows_too_long(loaded: Any, asked: list[list[int]]) -> None:
    model, tokenizer = loaded
    out = io.StringIO()
    lines = [f"question {number} about the cat and the dog" for number in range(6)]
    chat(model, tokenizer, decode.Drawing(max_new_tokens=20), ends=[2], read=typed(lines), stream=out)
    assert "oldest turns no longer fit" in out.getvalue()
    assert len(asked) == 6 and all(len(ids) < 128 for ids in asked)
    assert "question 5" in tokenizer.decode(asked[5]) and "question 0" not in tokenizer.decode(asked[5])


def test_a_question_that_is_too_long_is_said_and_not_kept(loaded: Any, asked: list[list[int]]) -> None:
    model, tokenizer = loaded
    out = io.StringIO()
    chat(model, tokenizer, decode.Drawing(max_new_tokens=4), ends=[2], read=typed(["cat " * 200, "dog"]), stream=out)
    assert "too long for the model's 128 positions" in out.getvalue()
    assert asked == [masks.prompt_ids(tokenizer, [{"role": "user", "content": "dog"}])]


def test_the_launcher_talks_over_a_pipe(base_model: Path, tmp_path: Path) -> None:
    """As `echo ... | generate.sh --chat`; the end of the input ends it."""
    import shutil
    import subprocess
    import sys

    folder = tmp_path / "chat"
    shutil.copytree(base_model, folder)
    (folder / "chat_template.jinja").write_text(chat_template.build("### Human:", "### Assistant:"))
    script = Path(__file__).parents[2] / "scripts" / "step4_finetune_model" / "generate.py"
    argv = [sys.executable, str(script), "--model_name_or_path", str(folder), "--chat", "--max_new_tokens", "5"]
    done = subprocess.run(
        [*argv, "--device", "cpu"], input="the cat\n/new\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = verify.load(folder)
    ids = masks.prompt_ids(tokenizer, [{"role": "user", "content": "the cat"}])
    (said,) = decode.decode(model, [ids], decode.Drawing(max_new_tokens=5), ends=[2], pad_id=3)
    answer = tokenizer.decode(said, skip_special_tokens=True).strip()
    assert done.stdout.endswith(f"> {answer}\n> (forgotten)\n> ")
