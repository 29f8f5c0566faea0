"""One runner: output copied and kept, exit codes true, signals passed on, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import process
from train.process import Command


def python(code: str, **environment: str) -> Command:
    return Command((sys.executable, "-c", code), environment)


def is_running(pid: str) -> bool:
    """Whether a process exists and is no zombie that waits for its parent to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("code", [0, 1, 2, 4, 77])
def test_the_exit_code_is_the_programs(code):
    assert process.run(python(f"raise SystemExit({code})")) == code


def test_death_by_signal_shows_as_shells_have_it():
    assert process.run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")) == 128 + 9


def test_output_goes_to_the_terminal_and_the_log(tmp_path, capfd):
    log = tmp_path / "logs" / "run.log"
    process.run(python("import sys; print('out'); print('err', file=sys.stderr)"), log=log)
    assert sorted(log.read_text().split()) == ["err", "out"]
    assert sorted(capfd.readouterr().out.split()) == ["err", "out"]


def test_rendered_files_are_there_before_it_starts(tmp_path, capfd):
    file = tmp_path / "new" / "config.json"
    command = Command((sys.executable, "-c", f"print(open({str(file)!r}).read())"), files={file: "{}"})
    assert process.run(command) == 0
    assert capfd.readouterr().out == "{}\n"


def test_arguments_reach_the_program_unchanged(awkward_path, capfd):
    words = ("a b", "$HOME", "'", '"', "; echo broken", "日本語")
    process.run(Command((sys.executable, "-c", "import sys; print(sys.argv[1:])", *words), working_dir=awkward_path))
    assert capfd.readouterr().out.strip() == repr(list(words))


def test_secrets_are_not_shown_and_words_are_quoted():
    command = Command(("prog", "a b"), {"HF_TOKEN": "hf_123", "WANDB_API_KEY": "w", "OMP_NUM_THREADS": "1"})
    assert command.text() == "HF_TOKEN=*** OMP_NUM_THREADS=1 WANDB_API_KEY=*** prog 'a b'"


def test_sigterm_reaches_the_program_and_all_it_started(tmp_path):
    """A launcher with a child that has a child of its own: after SIGTERM none of the three is left."""
    pids = tmp_path / "pids"
    inner = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    outer = f"import os, subprocess, sys; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n');"
    outer += f"sys.exit(subprocess.call([sys.executable, '-c', {inner!r}]))"
    call = f"process.run(process.Command((sys.executable, '-c', {outer!r})))"
    launcher = f"import sys; from train import process; sys.exit({call})"
    running = subprocess.Popen([sys.executable, "-c", launcher])
    deadline = time.monotonic() + 30
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline, "the programs did not start"
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=30) == 128 + 15
    ends_soon(pids)


def test_ranks_in_sessions_of_their_own_end_with_a_killed_launcher(tmp_path):
    """As torchrun starts them: a child in a new session, whose parent is killed, ends too, and nobody waits for it."""
    pid = tmp_path / "pid"
    rank = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import os, signal, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {rank!r}],"
    code += f" start_new_session=True)\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.01)\n"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    assert process.run(python(code)) == 128 + 9
    ends_soon(pid)


def test_what_it_started_ends_when_we_are_killed(tmp_path):
    pid = tmp_path / "pid"
    inner = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    call = f"process.run(process.Command((sys.executable, '-c', {inner!r})))"
    running = subprocess.Popen([sys.executable, "-c", f"import sys; from train import process; {call}"])
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
    running.kill()
    running.wait(timeout=30)
    ends_soon(pid)


def ends_soon(pids: Path) -> None:
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.05)


def test_capture_answers_for_a_missing_program_and_a_slow_one():
    assert process.capture(Command(("no-such-program-here",)))[0] == 127
    assert process.capture(python("import time; time.sleep(30)"), timeout_s=0.2)[0] == 124
    assert process.capture(python("print('x')")) == (0, "x\n")


class Watching:
    """A watcher that writes down what it is told, and has the program killed once `over` holds."""

    def __init__(self, over=lambda _: False):
        self.printed, self.signals, self.asked, self._over = b"", [], 0, over

    def output(self, chunk):
        self.printed += chunk

    def signalled(self, number):
        self.signals.append(number)

    def is_over(self):
        self.asked += 1
        return self._over(self)


def test_a_watcher_sees_all_output_and_leaves_a_good_end_alone(tmp_path, capfd):
    watcher = Watching()
    assert process.run(python("print('a' * 100_000); print('end')"), log=tmp_path / "log", watcher=watcher) == 0
    assert watcher.printed == (tmp_path / "log").read_bytes() == capfd.readouterr().out.encode()
    assert watcher.printed.endswith(b"end\n") and watcher.asked and watcher.signals == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watcher_is_told_of_signals_and_the_program_is_not(number, capfd):
    """Nothing else ends the program, whose own status then counts."""
    watcher = Watching()
    code = f"import os, signal, time; signal.signal({int(number)}, signal.SIG_DFL);"
    code += f"os.kill(os.getppid(), {int(number)}); time.sleep(1.5); print('went on'); raise SystemExit(7)"
    before = signal.getsignal(number)
    assert process.run(python(code), watcher=watcher) == 7
    assert watcher.signals == [number] and watcher.printed == b"went on\n"
    assert signal.getsignal(number) is before
    capfd.readouterr()


def test_a_watcher_that_says_over_has_the_program_and_all_it_started_killed(tmp_path, capfd):
    pids = tmp_path / "pids"
    inner = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    code = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n{inner}"
    )
    watcher = Watching(over=lambda _: pids.exists() and len(pids.read_text().split()) == 2)
    assert process.run(python(code), watcher=watcher) == 128 + 9
    ends_soon(pids)


def test_a_watchers_own_error_leaves_nothing_running(tmp_path):
    pid = tmp_path / "pid"

    def broken(_):
        if pid.exists() and pid.read_text():
            raise RuntimeError("broken")

    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(RuntimeError, match="broken"):
        process.run(python(code), watcher=Watching(over=broken))
    ends_soon(pid)


@pytest.mark.parametrize("runner", [process.run, process.capture])
def test_secrets_stay_here_when_a_command_hides_them(monkeypatch, capfd, runner):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "aws_secret_access_key"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    code = "import os; print(sorted(name for name, value in os.environ.items() if value == 'planted'));"
    code += "print(os.environ['TOKENIZERS_PARALLELISM'], os.environ['GIVEN_TOKEN'])"
    hidden = Command((sys.executable, "-c", code), {"GIVEN_TOKEN": "meant"}, hides_secrets=True)
    told = runner(hidden)
    text = told[1] if isinstance(told, tuple) else capfd.readouterr().out
    assert text == "[]\nfalse meant\n"
    assert process.capture(python(code, GIVEN_TOKEN="x"))[1].count("'") == 8


def test_a_terminal_that_is_closed_ends_no_run_in_the_background(tmp_path: Path) -> None:
    """As after `pretrain.sh ... & disown` and the end of the ssh session: writing to the terminal is an error then."""
    code = (
        "import sys; from pathlib import Path; from train import process\n"
        "ranks = 'import time\\nfor _ in range(6): print(\"step\", flush=True); time.sleep(0.3)'\n"
        "status = process.run(process.Command((sys.executable, '-c', ranks)), log=Path(sys.argv[1]))\n"
        "print('done', flush=True); raise SystemExit(status)"
    )
    terminal, ours = os.openpty()
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "log"], stdout=ours, stderr=ours) as child:
        os.close(ours)
        assert b"step" in os.read(terminal, 1000)
        os.close(terminal)
        assert child.wait(30) == 0
    assert (tmp_path / "log").read_text().split() == ["step"] * 6


def test_a_program_has_the_time_to_end_that_it_is_given(tmp_path: Path) -> None:
    """A step of all steps saves for longer than half a minute; here the seconds are tenths."""
    code = (
        "import sys; from train import process\n"
        "deaf = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'\n"
        "raise SystemExit(process.run(process.Command((sys.executable, '-c', deaf)), grace_s=0.5))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        child.terminate()
        assert child.wait(20) == 143
