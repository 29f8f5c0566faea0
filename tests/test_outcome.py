from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train import outcome
from train.early_end import EndedEarlyError
from train.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_NON_FINITE_LOSS, NonFiniteLossError, UserError


def test_the_first_report_stays(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "outcome.json"
    outcome.write(file, 4, ["the loss is NaN"])
    outcome.write(file, 1, ["a peer went away"])
    assert outcome.read(file) == outcome.Outcome(4, ("the loss is NaN",))
    assert [entry.name for entry in file.parent.iterdir()] == ["outcome.json"]


def test_no_report(tmp_path: Path) -> None:
    assert outcome.read(tmp_path / "outcome.json") is None


def test_a_rank_reports_what_the_user_must_know(tmp_path: Path) -> None:
    file = tmp_path / "outcome.json"

    def fail() -> None:
        raise NonFiniteLossError("step 3: the loss is nan")

    assert outcome.record(file, fail) == EXIT_NON_FINITE_LOSS
    with pytest.raises(UserError, match="step 3") as caught:
        outcome.check(file, 1, log=tmp_path / "log")
    assert caught.value.exit_code == EXIT_NON_FINITE_LOSS


def test_only_the_leading_rank_reports_success(tmp_path: Path) -> None:
    file = tmp_path / "outcome.json"
    assert outcome.record(file, lambda: None, leads=False) == 0
    assert outcome.read(file) is None
    assert outcome.record(file, lambda: None) == 0
    outcome.check(file, 0, log=tmp_path / "log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_rank_says_so(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "outcome.json"
    former = signal.getsignal(signal.SIGTERM)
    try:
        assert outcome.record(file, lambda: signal.raise_signal(number)) == EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, former)
    with pytest.raises(UserError, match="goes on from the last checkpoint") as caught:
        outcome.check(file, 128 + number, log=tmp_path / "log")
    assert caught.value.exit_code == EXIT_INTERRUPTED


@pytest.mark.parametrize("status", [0, 1])
def test_ranks_that_were_stopped_because_another_died_are_no_interruption(tmp_path: Path, status: int) -> None:
    file = tmp_path / "outcome.json"
    outcome.write(file, EXIT_INTERRUPTED, ["interrupted"])
    with pytest.raises(UserError, match=r"broke off|without saying how") as caught:
        outcome.check(file, status, log=tmp_path / "log")
    assert caught.value.exit_code == EXIT_FAILURE


@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_run_that_saved_and_ended_early_says_so(tmp_path: Path, status: int) -> None:
    file = tmp_path / "outcome.json"

    def end() -> None:
        raise EndedEarlyError(1200, "asked by SIGTERM")

    assert outcome.record(file, end, leads=False) == EXIT_INTERRUPTED
    with pytest.raises(UserError, match=r"saved step 1,200 and ended early \(asked by SIGTERM\): the same") as caught:
        outcome.check(file, status, log=tmp_path / "log")
    assert caught.value.exit_code == EXIT_INTERRUPTED


def test_our_own_mistakes_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        outcome.record(tmp_path / "outcome.json", lambda: print(1 // 0))
    assert outcome.read(tmp_path / "outcome.json") is None


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (1, "broke off with status 1", EXIT_FAILURE),
        (137, "broke off with status 137", EXIT_FAILURE),
        (130, "interrupted", EXIT_INTERRUPTED),
        (143, "interrupted", EXIT_INTERRUPTED),
        (0, "without saying how", EXIT_FAILURE),
    ],
)
def test_a_run_without_report_is_never_taken_for_success(tmp_path: Path, status: int, message: str, code: int) -> None:
    with pytest.raises(UserError, match=message) as caught:
        outcome.check(tmp_path / "outcome.json", status, log=tmp_path / "the.log")
    assert caught.value.exit_code == code


def test_a_failed_command_is_not_hidden_by_an_earlier_success(tmp_path: Path) -> None:
    file = tmp_path / "outcome.json"
    outcome.write(file, 0)
    with pytest.raises(UserError, match="status 1"):
        outcome.check(file, 1, log=tmp_path / "log")


@pytest.mark.parametrize("told", [None, (0, ()), (EXIT_INTERRUPTED, ("interrupted",))])
def test_what_only_the_launcher_knows_is_kept_for_whoever_asks_later(tmp_path: Path, told) -> None:
    file, log = tmp_path / "outcome.json", tmp_path / "log"
    if told is not None:
        outcome.write(file, *told)
    with pytest.raises(UserError):
        outcome.check(file, 137, log=log, cause="rank 1 on node2 was killed by SIGKILL.")
    text = f"rank 1 on node2 was killed by SIGKILL.\nAll of the output: {log}."
    assert outcome.read(file) == outcome.Outcome(137, (text,))


_LEAVES = """
import sys
from pathlib import Path
import torch
from train import outcome, rank_end

def body():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

def main():
    assert outcome.record(Path(sys.argv[1]), body, leads=True) == 0
    return int(torch.distributed.is_initialized())

rank_end.run(main)
"""


def test_a_rank_that_is_done_leaves_its_process_group(tmp_path):
    done = subprocess.run([sys.executable, "-c", _LEAVES, tmp_path / "o.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_DEAF = """
import multiprocessing, sys, time
from pathlib import Path
import torch.distributed
from train import outcome

def body():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    time.sleep(0.5)
    child.terminate()  # no signal to this process
    child.join()
    time.sleep(6)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    print("waits", flush=True)
    store.get("what nobody will ever put there")  # waits in C++, and takes up again what a signal interrupts

raise SystemExit(outcome.record(Path(sys.argv[1]), body))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_in_a_library_is_interrupted_too(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "outcome.json"
    with subprocess.Popen([sys.executable, "-c", _DEAF, file], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "waits\n"
        running.send_signal(number)
        assert running.wait(60) == EXIT_INTERRUPTED
    assert outcome.read(file) == outcome.Outcome(EXIT_INTERRUPTED, (outcome.INTERRUPTED,))
