"""Notes between ranks: all of them, or the reason why they will not come; and whose disk a folder is on."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from train.engine.megatron_deepspeed import rank_notes
from train.engine.megatron_deepspeed.patches import whole_checkpoints
from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER, EXIT_VERIFICATION, UserError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(rank_notes, "_store", lambda: store)


def test_all_notes_are_waited_for_and_read_in_order() -> None:
    found: list[str] = []
    reading = threading.Thread(target=lambda: found.extend(rank_notes.read(["8/0", "8/1"], unless="8/failed")))
    rank_notes.leave("8/1", "second")
    reading.start()
    reading.join(0.3)
    assert reading.is_alive()
    rank_notes.leave("8/0", "first")
    reading.join(30)
    assert found == ["first", "second"]
    rank_notes.remove(["8/0", "8/1"])
    rank_notes.leave("8/failed", "gone")
    with pytest.raises(rank_notes.NotComingError, match="gone"):
        rank_notes.read(["8/0"], unless="8/failed")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "full", "a.pt"), EXIT_USER, "a.pt: no space left"),
        (OSError(errno.EIO, "Input/output error", "a.pt"), EXIT_FAILURE, "Input/output error"),
        (UserError("ten are too many.", exit_code=EXIT_VERIFICATION), EXIT_VERIFICATION, "ten are too many."),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted: the same command goes on"),
    ],
)
def test_ranks_end_as_the_one_that_could_not_write(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    writing: list[Callable[[], object]] = [lambda: (_ for _ in ()).throw(error)]
    for rank, writers in ((1, writing), (0, [])):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with pytest.raises(BaseException) as raised:
            whole_checkpoints._write(tmp_path, tmp_path / "step8", whole_checkpoints._Files([], writers), 0, 0.0, None)
        if rank == 1:
            assert raised.value is error
    assert isinstance(raised.value, UserError) and raised.value.exit_code == code
    assert said in str(raised.value)
    named = f"step8, rank 1 on {socket.gethostname()}: " in str(raised.value)
    assert named is not isinstance(error, KeyboardInterrupt)


def test_who_is_slow_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rank_notes, "_PATIENCE_S", 0)

    def tell(name: str, seconds: int) -> None:
        whole_checkpoints._tell_slow(name, seconds)
        rank_notes.leave(name, "at last")

    assert rank_notes.read(["global_step8/3"], unless="x", tell=tell) == ["at last"]
    said = capsys.readouterr().out
    assert said == "global_step8 is not whole yet: rank 3 has not written its files after 0 s\n"


def test_a_folder_on_a_disk_of_the_nodes_own_lacks_the_other_nodes_files(tmp_path: Path) -> None:
    unfinished, final = tmp_path / ".global_step8.unfinished-save", tmp_path / "global_step8"
    names = ["rank_0.pt", "rank_1.pt"]
    unfinished.mkdir()
    (unfinished / "rank_1.pt").touch()
    assert whole_checkpoints._is_of_this_node_alone(unfinished, final, names)
    (unfinished / "rank_0.pt").touch()  # shared, and its new name has not come through yet
    assert not whole_checkpoints._is_of_this_node_alone(unfinished, final, names)
    unfinished.rename(final)
    assert not whole_checkpoints._is_of_this_node_alone(unfinished, final, names)
