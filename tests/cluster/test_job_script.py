"""Job scripts: what is asked of each scheduler, and a body that tells the truth about how the launcher ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from train.cluster import directives, job_script
from train.cluster.job_folder import JobFiles
from train.cluster.job_script import Task
from train.cluster.settings import SubmitSettings
from train.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
FULL = {"wall_time": "1-12:00:00", "account": "gca50000", "notify": "me@example.org", "num_jobs": 3}
CASES = {
    "slurm": ("slurm", SubmitSettings(job_nodes=2, job_gpus_per_node=8, job_cpus_per_node=64, queue="gpu",
              scheduler_options=("--exclusive", "--constraint=h100"), **FULL)),
    "slurm_smallest": ("slurm", SubmitSettings()),
    "gridengine": ("gridengine", SubmitSettings(job_nodes=2, job_cpus_per_node=16, parallel_environment="mpi",
                   queue="all.q", scheduler_options=("-l gpu=4",), **FULL)),
    "gridengine_abci": ("gridengine", SubmitSettings(job_nodes=2, resource="rt_F", **FULL)),
    "pbs": ("pbs", SubmitSettings(job_nodes=2, job_gpus_per_node=8, job_cpus_per_node=64, queue="workq", **FULL)),
    "pbs_abci": ("pbs", SubmitSettings(job_nodes=2, queue="rt_HF", **FULL)),
}  # fmt: skip


def task(root: Path = Path("/shared/out/job"), name: str = "gpt 0.1B", **more) -> Task:
    files = JobFiles(root, name, "20260102_030405")
    command = ("bash", "/shared/train/pretrain.sh", "--recipe", str(files.settings), "--num_nodes", "2")
    environment = {"PATH": "/opt/bin", "TRAIN_PYTHON": "/p/python"}
    plain = {"command": command, "working_dir": Path("/home/me/my project"), "environment": environment}
    return Task(files=files, **{**plain, **more})


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_as_reviewed(name):
    """The golden files are what a person has read. To accept a change: read the new text, then write it there."""
    scheduler, job = CASES[name]
    more = {"first_arguments": ("--overwrite",), "required": Path("/shared/out/job/before.exit")}
    run = "gpt_0.1B" if scheduler == "gridengine" else "gpt 0.1B"
    text = job_script.build(scheduler, job, task(name=run, **(more if name == "gridengine" else {})))
    golden = GOLDEN / f"job_{name}.txt"
    if os.environ.get("ACCEPT_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"if this is meant: ACCEPT_GOLDEN=1, and read the difference in {golden}"


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_clean_bash(name, tmp_path):
    scheduler, job = CASES[name]
    file = tmp_path / "job.sh"
    file.write_text(job_script.build(scheduler, job, task(first_arguments=("--overwrite",))))
    subprocess.run(["bash", "-n", str(file)], check=True)
    shellcheck = shutil.which("shellcheck") or pytest.skip("shellcheck is not on the PATH")
    done = subprocess.run([shellcheck, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_schedulers_wait_for_the_job_before():
    job, script = SubmitSettings(account="g"), Path("/s.sh")
    assert job_script.submit_command("slurm", job, script) == ("sbatch", "/s.sh")
    both = {"succeeded": "4", "ended": "5"}
    assert job_script.submit_command("slurm", job, script, **both) == (
        "sbatch", "--dependency=afterok:4,afterany:5", "--kill-on-invalid-dep=yes", "/s.sh")  # fmt: skip
    assert job_script.submit_command("gridengine", job, script, **both) == ("qsub", "-hold_jid", "4,5", "/s.sh")
    assert job_script.submit_command("pbs", job, script, **both) == (
        "qsub", "-W", "depend=afterok:4,afterany:5", "/s.sh")  # fmt: skip


def test_only_abci_takes_the_group_on_the_command_line():
    abci = SubmitSettings(account="gca50000", resource="rt_F")
    assert job_script.submit_command("gridengine", abci, Path("/s.sh"))[:3] == ("qsub", "-g", "gca50000")
    files = task().files
    assert "#$ -P gca50000" not in list(directives.build("gridengine", abci, files))
    assert "#$ -P gca50000" in list(directives.build("gridengine", SubmitSettings(account="gca50000"), files))


@pytest.mark.parametrize(
    ("scheduler", "job", "root", "message"),
    [
        ("slurm", {"queue": "a b"}, "/o", "--queue 'a b': a name without spaces"),
        ("slurm", {"account": "a\n#SBATCH --x"}, "/o", "--account .* a name without spaces"),
        ("slurm", {"scheduler_options": ("--a\nrm -rf /",)}, "/o", "--scheduler_options .* on one line"),
        ("pbs", {"scheduler_options": ("exclusive",)}, "/o", "--scheduler_options 'exclusive': an option"),
        ("slurm", {}, "/a\nb", "which job scripts cannot hold"),
        ("slurm", {}, '/a"b', "which job scripts cannot hold"),
        ("gridengine", {"job_nodes": 2}, "/o", "--parallel_environment NAME"),
        ("gridengine", {"job_gpus_per_node": 4}, "/o", "each Grid Engine names its GPUs otherwise"),
        ("gridengine", {"resource": "rt_F", "parallel_environment": "mpi"}, "/o", "leave one of them out"),
        ("slurm", {"parallel_environment": "mpi"}, "/o", "is Grid Engine's, not Slurm's"),
        ("slurm", {"resource": "rt_F"}, "/o", "--resource rt_F is Grid Engine's; Slurm is told by --queue"),
        ("pbs", {"resource": "rt_HF"}, "/o", "--queue rt_HF"),
    ],
)
def test_what_cannot_be_said_to_a_scheduler_is_refused(scheduler, job, root, message):
    with pytest.raises(UserError, match=message):
        job_script.build(scheduler, SubmitSettings(**job), task(Path(root)))


def test_all_problems_at_once():
    with pytest.raises(UserError) as caught:
        job_script.build("slurm", SubmitSettings(queue="a b", notify="c d", resource="rt_F"), task())
    assert len(caught.value.problems) == 3


def test_names_that_every_scheduler_takes():
    assert directives.job_name("gpt_0.1B-x") == "gpt_0.1B-x"
    assert directives.job_name("7B モデル/a:b") == "job_7B_____a_b"
    assert len(directives.job_name("a" * 150)) == 100


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"wall_time": "0:10:00"}, "--save_margin_min 10 leaves nothing of --wall_time 0:10:00"),
        ({"wall_time": "12h"}, "HOURS:MINUTES:SECONDS was expected"),
        ({"num_jobs": 3}, "--num_jobs 3 needs --wall_time"),
    ],
)
def test_settings_that_contradict_themselves(job, message):
    assert message in "\n".join(SubmitSettings(**job).problems())


class Body:
    """A job script whose launcher is a small bash script of the test's own."""

    def __init__(self, folder: Path, launcher: str, scheduler: str = "slurm", **more) -> None:
        self.launcher = folder / "launcher.sh"
        self.launcher.write_text(launcher)
        job = SubmitSettings(num_jobs=3, wall_time="1:00:00")
        self.task = task(folder, working_dir=folder, command=("bash", str(self.launcher), "--recipe", "r"), **more)
        self.files = self.task.files
        self.files.script.write_text(job_script.build(scheduler, job, self.task))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        clean = {
            name: value for name, value in os.environ.items() if name not in ("SLURM_JOB_ID", "JOB_ID", "PBS_JOBID")
        }
        return subprocess.Popen(
            ["bash", str(self.files.script), *arguments], env={**clean, **variables}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        child = self.start(*arguments, **variables)
        text, _ = child.communicate(timeout=60)
        return child.returncode, text


def test_the_exit_code_is_the_launchers_and_is_kept(awkward_path):
    body = Body(awkward_path, 'echo "got $*"; exit 130')
    code, text = body.run(SLURM_JOB_ID="7")
    assert code == 130 and "got --recipe r" in text
    assert body.files.exit_record.read_text() == "7 130\n"


def test_by_hand_it_takes_more_flags_and_leaves_no_record(awkward_path):
    body = Body(awkward_path, 'echo "got $*, in $PWD, by $TRAIN_PYTHON"; exit 2')
    code, text = body.run("--dry_run")
    assert code == 2
    assert f"got --recipe r --dry_run, in {awkward_path}, by /p/python" in text
    assert not body.files.exit_record.exists()


@pytest.mark.parametrize(
    ("former", "goes_on"), [(0, False), (2, False), (3, False), (4, False), (1, True), (130, True)]
)
def test_a_chain_goes_on_only_where_that_makes_sense(tmp_path, former, goes_on):
    body = Body(tmp_path, "echo started; exit 5")
    body.files.exit_record.write_text(f"7 {former}\n")
    code, text = body.run(SLURM_JOB_ID="8")
    assert (code, "started" in text) == ((5, True) if goes_on else (former, False))
    assert body.files.exit_record.read_text() == ("8 5\n" if goes_on else f"7 {former}\n")


def test_a_requeued_job_does_not_stop_at_its_own_record(tmp_path):
    body = Body(tmp_path, "exit 0")
    body.files.exit_record.write_text("7 2\n")
    assert body.run(SLURM_JOB_ID="7")[0] == 0


def test_only_the_first_start_begins_again(tmp_path):
    body = Body(tmp_path, 'echo "got $*"; exit 1', first_arguments=("--overwrite",))
    assert "got --recipe r --overwrite\n" in body.run(SLURM_JOB_ID="7")[1]
    assert "got --recipe r\n" in body.run(SLURM_JOB_ID="7")[1]


@pytest.mark.parametrize(("record", "code"), [(None, 1), ("5 3\n", 3), ("5 0\n", 0)])
def test_where_the_scheduler_cannot_ask_for_success_the_script_does(tmp_path, record, code):
    required = tmp_path / "before it.exit"
    if record:
        required.write_text(record)
    body = Body(tmp_path, "echo started", "gridengine", required=required, name="gpt")
    found, text = body.run(JOB_ID="7")
    assert (found, "started" in text) == (code, code == 0)
    assert ("error: the job before did not succeed" in text) == (code != 0)
    assert body.files.exit_record.read_text() == f"7 {code}\n"  # the step after it stops as well


@pytest.mark.parametrize(("scheduler", "variable"), [("pbs", "PBS_JOBID"), ("gridengine", "JOB_ID")])
def test_where_the_scheduler_does_not_keep_a_log_the_job_does(awkward_path, scheduler, variable):
    body = Body(awkward_path, "echo hello", scheduler)
    assert body.run(**{variable: "12.server"}) == (0, "")
    assert "hello\n" in body.files.log("12.server").read_text()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_job_leaves_the_launcher_time_and_its_own_exit_code_counts(tmp_path, number, times):
    """As Slurm and PBS do it: every process of the job gets the signal, some of them more than once."""
    launcher = 'trap "echo saving; exit 130" TERM INT\necho ready\nwhile true; do sleep 0.05; done'
    body = Body(tmp_path, launcher)
    child = body.start(SLURM_JOB_ID="7")
    assert child.stdout is not None
    while "ready" not in child.stdout.readline():
        pass
    for _ in range(times):
        os.killpg(child.pid, number)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "saving" in text
    assert body.files.exit_record.read_text() == "7 130\n"


@pytest.mark.parametrize(
    ("preempted", "requeues"), [("PreemptTime=2026-01-02T03:04:05", True), ("PreemptTime=None", False)]
)
def test_a_job_that_was_preempted_goes_back_into_the_queue(tmp_path, preempted, requeues):
    """However much scontrol says after that word, and in how many pieces: a job of many nodes has a long list."""
    (tmp_path / "bin").mkdir()
    fakes = {
        "scontrol": f'echo "$*" >>{tmp_path}/calls\n[[ "$1" == show ]] || exit 0\n'
        f'for _ in 1 2 3; do echo "   {preempted}"; printf "%04096d\\n" 0; sleep 0.1; done\n',
        "sleep": "exec /bin/sleep 0.1\n",
    }
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    body = Body(tmp_path, "exit 130\n", environment={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    code, text = body.run(SLURM_JOB_ID="7")
    assert code == 130 and ("was pre-empted: back into the queue" in text) == requeues, text
    assert (tmp_path / "calls").read_text().splitlines() == ["show job 7", *["requeue 7"] * requeues]
