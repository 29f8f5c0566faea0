"""Checkpoints beside the training: copies that do not change, files as they would have been, failures that are told."""

from __future__ import annotations

import io
import threading
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from train.engine.megatron_deepspeed import memory_copies
from train.engine.megatron_deepspeed.memory_copies import MemoryCopies
from train.engine.megatron_deepspeed.saving import Saving

torch = pytest.importorskip("torch")


def state() -> dict[str, Any]:
    """Flat memory that tensors share, a parameter, and what else stands in a checkpoint."""
    flat = torch.arange(12, dtype=torch.float32)
    return {
        "module": OrderedDict(weight=flat[:6].view(2, 3), bias=flat[6:9], turned=flat[:6].view(2, 3).t()),
        "tied": [flat, torch.nn.Parameter(torch.ones(3)), (torch.zeros(0), torch.tensor(3))],
        "half": torch.ones(5, dtype=torch.bfloat16),
        "master": torch.ones(2, requires_grad=True),
        "args": Namespace(lr=1.0, betas=[0.9, 0.95]),
        "shapes": [torch.Size([2, 3])],
        "step": 7,
    }


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_a_copy_is_what_would_have_been_written_and_stays_so() -> None:
    given = state()
    wanted = saved(given)
    copied = MemoryCopies(1).take(given)
    for tensor in (given["tied"][0], given["half"], given["tied"][1].data):
        tensor.zero_()
    given["args"].betas.append(0)
    given["module"]["more"] = torch.ones(1)
    assert saved(copied) == wanted
    assert copied["module"]["weight"].data_ptr() == copied["tied"][0].data_ptr()
    assert type(copied["tied"][1]) is torch.nn.Parameter and copied["tied"][1].requires_grad


def test_the_next_checkpoint_takes_the_same_memory() -> None:
    copies = MemoryCopies(1)
    first = [copies.take({"a": torch.ones(4)}), copies.take({"b": torch.ones(8)})]
    places = [first[0]["a"].data_ptr(), first[1]["b"].data_ptr()]
    copies.begin()
    again = [copies.take({"a": torch.full((4,), 2.0)}), copies.take({"b": torch.ones(9)})]
    assert again[0]["a"].data_ptr() == places[0] and again[0]["a"].tolist() == [2.0] * 4
    assert again[1]["b"].tolist() == [1.0] * 9


@pytest.mark.parametrize(("ranks", "enough"), [(1, True), (2, False)])
def test_copies_take_half_of_what_is_free_at_most(ranks: int, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_copies, "free_bytes", lambda: 2 * 4096)
    copies = MemoryCopies(ranks)
    assert (copies.take({"a": torch.zeros(1024)}) is not None) is enough
    copies.begin()
    monkeypatch.setattr(memory_copies, "free_bytes", lambda: 0)  # what it has it keeps
    assert (copies.take({"a": torch.zeros(1024)}) is not None) is enough


def test_without_memory_a_file_is_written_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_copies, "free_bytes", lambda: 0)
    saving = Saving(is_async=True)
    saving.begin()
    assert saving.writer(torch.save, {"a": torch.ones(2)}, tmp_path / "a.pt") is None
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [1.0, 1.0]


def test_files_are_written_while_the_training_goes_on(tmp_path: Path) -> None:
    saving, weights, goes_on = Saving(is_async=True), torch.ones(2), threading.Event()
    saving.begin()
    write = saving.writer(torch.save, {"a": weights}, tmp_path / "a.pt")
    assert write is not None

    def publish() -> None:
        assert goes_on.wait(60)
        write()

    saving.end(publish)
    weights.zero_()  # the next step
    assert not (tmp_path / "a.pt").exists()
    saving.check()
    goes_on.set()
    saving.wait()
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [1.0, 1.0]


def test_what_goes_wrong_beside_the_training_ends_it() -> None:
    saving = Saving(is_async=True)

    def publish() -> None:
        raise OSError(28, "No space left on device")

    saving.begin()
    saving.end(publish)
    with pytest.raises(OSError, match="No space left"):
        saving.wait()
    saving.begin()  # told once


def test_at_once_is_at_once() -> None:
    saving, done = Saving(), []
    saving.begin()
    assert saving.writer(lambda value, path: done.append((value, path)), "state", "file") is None
    saving.end(lambda: done.append("published"))
    assert done == [("state", "file"), "published"]
