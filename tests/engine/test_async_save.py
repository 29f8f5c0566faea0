"""Checkpoints beside the training: copies that do not change, files as they would have been, failures that are told."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
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
    copies = MemoryCopies(1)
    copies.begin()
    copied = copies.take(given)
    for tensor in (given["tied"][0], given["half"], given["tied"][1].data):
        tensor.zero_()
    given["args"].betas.append(0)
    given["module"]["more"] = torch.ones(1)
    assert saved(copied) == wanted
    assert copied["module"]["weight"].data_ptr() == copied["tied"][0].data_ptr()
    assert type(copied["tied"][1]) is torch.nn.Parameter and copied["tied"][1].requires_grad


def test_the_next_checkpoint_takes_the_same_memory() -> None:
    copies = MemoryCopies(1)
    copies.begin()
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
    copies.begin()
    assert (copies.take({"a": torch.zeros(1024)}) is not None) is enough
    monkeypatch.setattr(memory_copies, "free_bytes", lambda: 0)  # what it has it keeps
    copies.begin()
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


def test_the_next_checkpoint_waits_for_the_one_before() -> None:
    """It would take the memory that is still being written."""
    saving, goes_on, order = Saving(is_async=True), threading.Event(), []

    def publish() -> None:
        assert goes_on.wait(60)
        order.append("published")

    def begin_the_next() -> None:
        saving.begin()
        order.append("begun")

    saving.begin()
    saving.end(publish)
    waiting = threading.Thread(target=begin_the_next)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not order
    goes_on.set()
    waiting.join(60)
    assert order == ["published", "begun"]


def test_a_run_that_diverges_waits_for_its_last_checkpoint(tmp_path: Path) -> None:
    from train.engine.megatron_deepspeed.patches import progress_lines
    from train.errors import NonFiniteLossError

    saving = Saving(is_async=True)
    saving.begin()

    def publish() -> None:
        time.sleep(0.2)
        (tmp_path / "global_step4").mkdir()

    saving.end(publish)
    with pytest.raises(NonFiniteLossError, match=r"last good checkpoint is .*global_step4"):
        progress_lines.refuse_non_finite(float("nan"), 7, tmp_path, saving)


def test_half_of_what_is_free_is_for_all_files_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_copies, "free_bytes", lambda: 20 * 4096)
    copies = MemoryCopies(2)
    copies.begin()
    taken = [copies.take({"a": torch.zeros(1024)}) for _ in range(8)]
    assert [copy is not None for copy in taken] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("kind", ["two sizes at one address", "attribute", "negative", "sparse", "not a leaf"])
def test_what_a_copy_would_not_keep_is_written_at_once(kind: str) -> None:
    whole = torch.arange(8.0)
    if kind == "two sizes at one address":
        given: Any = {"a": whole, "b": torch.frombuffer(whole.numpy(), dtype=torch.float32, count=2)}
    elif kind == "attribute":
        whole.tag = "x"
        given = [whole]
    elif kind == "negative":
        given = (torch.ones(2, dtype=torch.complex64).mul(1j).conj().imag,)
    elif kind == "sparse":
        given = [torch.ones(2).to_sparse()]
    else:
        given = [torch.ones(2, requires_grad=True) * 2]
    copies = MemoryCopies(1)
    copies.begin()
    assert copies.take(given) is None


LEAVES = """
import sys, torch
from train import rank_end
from train.engine.megatron_deepspeed.saving import Saving
saving = Saving(is_async=True)
saving.begin()
write = saving.writer(torch.save, {"a": torch.zeros(1 << 26)}, sys.argv[1])
def publish():
    print("begun", flush=True)
    for _ in range(50):
        write()
saving.end(publish)
import time
time.sleep(0.3)
rank_end.run(lambda: 4)
"""


@pytest.mark.slow
def test_a_process_that_fails_while_a_file_is_written_ends_with_its_own_status(tmp_path: Path) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", LEAVES, str(tmp_path / "a.pt")], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 4 and done.stdout == "begun\n", done.stderr
