"""Submitting: what reaches sbatch and qsub, what is written, what is told, and what is left when one of them refuses.

The fakes answer as recorded from Slurm and Grid Engine (`recorded/`); PBS is not to be had here, its answers are those
of its manual and of ABCI 3.0's guide.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path

import pytest

from train.cluster import queue, submission, submit
from train.cluster.job_folder import JobFolder, read_exit
from train.cluster.settings import ClusterSettings, SubmitSettings
from train.errors import UserError

RECORDED = Path(__file__).parent / "recorded"
ANSWERS = {
    "slurm": ("sbatch", "Submitted batch job {id}"),
    "gridengine": ("qsub", 'Your job {id} ("gpt") has been submitted'),
    "pbs": ("qsub", "{id}.pbs1"),
}
# Keeps its arguments and its environment, and answers with a new number each time; from the ANSWERS on, or refuses.
FAKE = """#!/bin/bash
printf '%s\\n' "$*" >>{calls}
env -0 >{calls}.env
number=$(( $(wc -l <{calls}) + 40 ))
if [[ $number -gt {most} ]]; then
    echo "{refusal}" >&2
    exit 1
fi
echo "{answer}" | sed "s/{{id}}/$number/"
"""


class Cluster:
    """A PATH with one scheduler's commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
        self.scheduler, self.bin, self.calls = scheduler, folder / "bin", folder / "calls"
        self.bin.mkdir()
        program, answer = ANSWERS[scheduler]
        self.takes(1000, answer=answer)
        self.write("scancel" if scheduler == "slurm" else "qdel", f'echo "$*" >>{folder}/cancelled')
        self.cancelled = folder / "cancelled"
        self.program = program
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin")
        for name in [name for name in os.environ if name.startswith(("HF_TOKEN", "WANDB_API"))]:
            monkeypatch.delenv(name)

    def takes(self, jobs: int, *, refusal: str = "no more", answer: str | None = None) -> None:
        """From now on the scheduler takes so many jobs and refuses the next one."""
        program, usual = ANSWERS[self.scheduler]
        words = (answer or usual).replace('"', '\\"')
        self.write(program, FAKE.format(calls=self.calls, most=40 + jobs, answer=words, refusal=refusal, id="{id}"))

    def write(self, program: str, text: str) -> None:
        file = self.bin / program
        file.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def submitted(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture(params=ANSWERS)
def cluster(request, tmp_path, monkeypatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch, request.param)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch, "slurm")


def hand_in(cluster: Cluster, folder: JobFolder, *, own: ClusterSettings | None = None, **job) -> int:
    wanted = SubmitSettings(submit=cluster.scheduler, **{"wall_time": "2:00:00", **job})
    launcher = Path("scripts/pretrain.sh")
    return submit.submit(launcher, "training: {}\n", wanted, folder, cluster=own or ClusterSettings())


def test_a_job_is_submitted_recorded_and_told(cluster, tmp_path, capsys):
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    assert hand_in(cluster, folder) == 0
    record = folder.read()
    job_id = "41.pbs1" if cluster.scheduler == "pbs" else "41"
    assert record is not None and record.ids == (job_id,) and record.scheduler == cluster.scheduler
    assert record.settings is not None and record.settings.read_text() == "training: {}\n"
    assert cluster.submitted() == [str(record.script)]
    script = record.script.read_text()
    launcher = shlex.quote(str(Path("scripts/pretrain.sh").absolute()))
    assert f"bash {launcher} --recipe {record.settings} --num_nodes 1 --time_budget_min 110" in script
    assert record.logs == (tmp_path / "out" / "job" / f"gpt.{job_id}.log",)
    told = capsys.readouterr().out
    assert f"job {job_id} (gpt)" in told
    assert f"tail -F {record.logs[0]}" in told
    status = shlex.quote(str(Path("scripts/common/status.sh").absolute()))
    assert f"bash {status} {tmp_path / 'out'} --job_name gpt" in told
    assert f"{'scancel' if cluster.scheduler == 'slurm' else 'qdel'} {job_id}" in told


def test_a_chain_waits_for_the_end_of_each_job(cluster, tmp_path):
    folder = JobFolder.of_finetuning(tmp_path / "chat")
    hand_in(cluster, folder, num_jobs=3, after_job="7")
    script = folder.read().script  # type: ignore[union-attr]
    waits = {
        "slurm": ["--dependency=afterok:7{} --kill-on-invalid-dep=yes", ",afterany:41", ",afterany:42"],
        "gridengine": ["-hold_jid 7{}", ",41", ",42"],
        "pbs": ["-W depend=afterok:7{}", ",afterany:41.pbs1", ",afterany:42.pbs1"],
    }[cluster.scheduler]
    assert cluster.submitted() == [f"{waits[0].format(more)} {script}" for more in ("", *waits[1:])]
    assert folder.root == tmp_path / "chat.job" and not (tmp_path / "chat").exists()


def test_a_chain_is_submitted_as_a_whole_or_not_at_all(cluster, tmp_path):
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    cluster.takes(2, refusal="QOSMaxSubmitJobPerUserLimit")
    with pytest.raises(UserError) as caught:
        hand_in(cluster, folder, num_jobs=3)
    first, second = caught.value.problems
    assert "refused the job (exit code 1): QOSMaxSubmitJobPerUserLimit" in first
    ids = "41.pbs1, 42.pbs1" if cluster.scheduler == "pbs" else "41, 42"
    assert second == f"{ids} was submitted before and is cancelled again: nothing of this chain is left."
    assert cluster.cancelled.read_text().split() == ids.split(", ")
    assert list(folder.root.iterdir()) == []


def test_jobs_that_cannot_be_cancelled_are_named(slurm, tmp_path):
    slurm.takes(1)
    slurm.write("scancel", "echo 'scancel: error: no' >&2; exit 1")
    with pytest.raises(UserError, match=r"41 was submitted before and could not be cancelled \(scancel: error: no\)"):
        hand_in(slurm, JobFolder.of_pretraining(tmp_path / "out", "gpt"), num_jobs=2)


def test_the_schedulers_own_words_are_the_message(slurm, tmp_path):
    lines = (RECORDED / "slurm_sbatch_refused.txt").read_text().splitlines()[:2]
    slurm.takes(0, refusal="\n".join(lines))
    with pytest.raises(
        UserError, match=r"sbatch refused the job .*invalid partition specified: nowhere / sbatch: error"
    ):
        hand_in(slurm, JobFolder.of_pretraining(tmp_path / "out", "gpt"), queue="nowhere")


def test_without_the_scheduler_it_says_so(cluster, tmp_path, monkeypatch):
    (cluster.bin / cluster.program).unlink()
    monkeypatch.setenv("PATH", str(cluster.bin))
    (cluster.bin / "env").symlink_to("/usr/bin/env")
    with pytest.raises(UserError, match=f"there is no {cluster.program} on this machine"):
        hand_in(cluster, JobFolder.of_pretraining(tmp_path / "out", "gpt"))


@pytest.mark.parametrize("answer", ["Submitted batch job", "sbatch: ok", "", 'Your job 41 ("gpt") has been submitted'])
def test_an_answer_without_a_number_is_no_success(slurm, tmp_path, answer):
    slurm.takes(5, answer=answer or " ")
    with pytest.raises(UserError, match="gave no job number of Slurm"):
        hand_in(slurm, JobFolder.of_pretraining(tmp_path / "out", "gpt"))


def test_job_numbers_among_other_words():
    assert submit.parse_job_id("slurm", (RECORDED / "slurm_sbatch.txt").read_text()) == "1"
    text = "sbatch: lua: you have 5 hours left\nSubmitted batch job 4711 on cluster big\n"
    assert submit.parse_job_id("slurm", text) == "4711"
    text = 'Unable to run job: warning: odd\nYour job 40115860 ("hello_abci") has been submitted\n'
    assert submit.parse_job_id("gridengine", text) == "40115860"
    assert submit.parse_job_id("pbs", "INFO: project gca50000\n12345.pbs1\n") == "12345.pbs1"
    assert submit.parse_job_id("pbs", 'Your job 5 ("x") has been submitted') is None


def test_dry_run_prints_all_and_calls_nothing(cluster, tmp_path, capsys):
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    wanted = SubmitSettings(submit=cluster.scheduler, wall_time="2:00:00", num_jobs=2)
    submit.submit(Path("p.sh"), "a: 1\n", wanted, folder, cluster=ClusterSettings(), dry_run=True)
    told = capsys.readouterr().out
    assert "#!/bin/bash\n#" in told and ".yaml\na: 1\n" in told and "2 jobs in a row" in told
    assert cluster.submitted() == [] and not folder.root.exists()


def test_secrets_stay_here(cluster, tmp_path, capsys, monkeypatch):
    secret = "planted-secret-4711"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("https_proxy", f"http://me:{secret}@proxy:3128")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    hand_in(cluster, folder)
    told = capsys.readouterr()
    assert "note: AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY, https_proxy: set here" in told.out
    assert "--secrets_file" in told.out and "hf auth login" in told.out
    for file in [*(tmp_path / "out").rglob("*"), cluster.calls, Path(f"{cluster.calls}.env")]:
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file
    assert secret not in told.out + told.err
    assert "export HF_HOME=/shared/hf" in folder.read().script.read_text()  # type: ignore[union-attr]
    for call in cluster.submitted():
        assert "-V" not in call.split()


def test_with_a_secrets_file_nothing_needs_to_be_told(slurm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    hand_in(slurm, JobFolder.of_pretraining(tmp_path / "o", "g"), own=ClusterSettings(secrets_file=Path("s")))
    assert "note:" not in capsys.readouterr().out


def test_a_job_submitted_from_a_job_does_not_take_itself_for_it(slurm, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF", "SBATCH_QOS"):
        monkeypatch.setenv(name, "set")
    hand_in(slurm, JobFolder.of_pretraining(tmp_path / "out", "gpt"))
    names = {entry.partition("=")[0] for entry in Path(f"{slurm.calls}.env").read_text().split("\0")}
    assert {name for name in names if name.startswith(("SLURM_", "SBATCH_"))} == {"SLURM_CONF", "SBATCH_QOS"}


def test_a_run_is_not_submitted_twice(slurm, tmp_path):
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    slurm.write("squeue", "echo 'PENDING|Priority|N/A|2:00:00'")
    hand_in(slurm, folder)
    with pytest.raises(UserError, match=r"gpt is submitted already, and 41 is still in the queue: .*scancel 41"):
        hand_in(slurm, folder)
    hand_in(slurm, folder, after_job="41")
    slurm.write("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    hand_in(slurm, folder)
    assert len(slurm.submitted()) == 3
    assert len(list(folder.root.glob("*.sh"))) == 3, "a waiting job's script and settings stay as they were"


@pytest.mark.parametrize(
    ("own", "flags"),
    [
        ({}, ["--num_nodes", "2", "--time_budget_min", "110"]),
        ({"time_budget_min": 30}, ["--num_nodes", "2", "--time_budget_min", "30"]),
        ({"num_nodes": 2}, ["--time_budget_min", "110"]),
    ],
)
def test_the_launcher_is_told_its_nodes_and_its_time(own, flags):
    job = SubmitSettings(wall_time="2:00:00", job_nodes=2)
    assert submission.launcher_flags(job, ClusterSettings(**own)) == flags


def test_records(tmp_path):
    folder = JobFolder(tmp_path, "gpt")
    assert folder.read() is None
    for damaged in ("", "{}", "[1]", '{"ids": 5}'):
        folder.record.write_text(damaged)
        assert folder.read() is None
    file = tmp_path / "x.exit"
    assert read_exit(file) is None
    file.write_text("12.server 130\n")
    assert read_exit(file) == ("12.server", 130)
    file.write_text("12.ser")
    assert read_exit(file) is None
    assert json.loads(folder.record.read_text())


@pytest.mark.parametrize(
    ("code", "text", "state", "reason"),
    [
        (0, "PENDING|DependencyNeverSatisfied|N/A|5:00\n", "queued", "DependencyNeverSatisfied"),
        (0, "PENDING|Priority|2026-11-22T08:00:00|5:00\n", "queued", "Priority, expected to start at 2026-11-22T08"),
        (0, "RUNNING|None|2026-11-22T08:00:00|1:02:03\n", "running", "1:02:03 left"),
        (0, "CONFIGURING|None|2026-11-22T08:00:00|UNLIMITED\n", "running", "configuring"),
        (0, "TIMEOUT|TimeLimit|2026-11-22T08:00:00|0:00\n", "ended", r"TIMEOUT \(TimeLimit\)"),
        (0, "COMPLETED|None|2026-11-22T08:00:00|0:00\n", "ended", "COMPLETED"),
        (1, (RECORDED / "slurm_squeue_job_unknown.txt").read_text(), "ended", ""),
        (1, "slurm_load_jobs error: Unable to contact slurm controller", "unknown", "Unable to contact"),
        (127, "squeue: not found", "unknown", "squeue: not found"),
    ],
)
def test_what_slurm_says_of_a_job(code, text, state, reason):
    found = queue.parse_squeue(code, text)
    assert found.state == state
    assert re.search(reason, found.reason)


QSTAT = """job-ID  prior   name       user         state submit/start at     queue            slots ja-task-ID
-----------------------------------------------------------------------------------------------------------------
      5 0.50000 gpt        me           {state:5} 11/22/2026 07:00:00 all.q@node1          2
     15 0.50000 other      me           r     11/22/2026 07:00:00 all.q@node1          2
"""


@pytest.mark.parametrize(
    ("state", "found"),
    [("qw", "queued"), ("hqw", "queued"), ("Eqw", "queued"), ("r", "running"), ("t", "running"), ("dr", "running")],
)
def test_what_grid_engine_says_of_a_job(state, found):
    assert queue.parse_qstat("5", 0, QSTAT.format(state=state)).state == found
    assert queue.parse_qstat("1", 0, QSTAT.format(state=state)).state == "ended"
    assert queue.parse_qstat("5", 0, "").state == "ended"
    assert queue.parse_qstat("5", 1, "error: commlib error: can't connect to qmaster").state == "unknown"


def test_why_grid_engine_lets_a_job_wait():
    text = """jid_predecessor_list (req):  4
jid_predecessor_list:       4
error reason    1:          11/22/2026 07:00:00 [0:1]: can't open output file
scheduling info:            queue instance "all.q@node1" dropped because it is full
                            cannot run in PE "mpi" because it only offers 0 slots
"""
    assert queue.parse_pending_reasons(text) == [
        "after 4",
        "error: 11/22/2026 07:00:00 [0:1]: can't open output file",
        'queue instance "all.q@node1" dropped because it is full',
        'cannot run in PE "mpi" because it only offers 0 slots',
    ]


@pytest.mark.parametrize(
    ("code", "text", "state", "reason"),
    [
        (0, "Job Id: 1.s\n    Job_Name = gpt\n    job_state = Q\n    comment = Not Running: Insufficient amount\n"
            "\tof resource: ngpus\n", "queued", "Not Running: Insufficient amountof resource: ngpus"),
        (0, "Job Id: 1.s\n    job_state = R\n    comment = Job run at Sun Nov 22 at 07:00\n", "running", "Job run at"),
        (0, "Job Id: 1.s\n    job_state = F\n    Exit_status = 130\n    comment = x\n", "ended", "exit code 130"),
        (153, "qstat: Unknown Job Id 1.s", "ended", ""),
        (35, "qstat: 1.s Job has finished, use -x or -H to obtain historical job information", "ended", ""),
        (1, "pbs_connect: cannot connect to server", "unknown", "cannot connect"),
    ],
)  # fmt: skip
def test_what_pbs_says_of_a_job(code, text, state, reason):
    found = queue.parse_pbs(code, text)
    assert found.state == state and reason in found.reason


def test_names_of_two_submissions_in_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102_030405")
    folder = JobFolder(tmp_path, "gpt")
    folder.new_files().script.touch()
    assert folder.new_files().script.name == "gpt_20260102_030405_2.sh"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_nodes": 3}, "--num_nodes 3: the job asks for 2"),
        ({"hostfile": Path("hostfile")}, "--hostfile hostfile: which nodes the job gets is known when it starts"),
        ({"launcher": "local"}, "--launcher local starts on one node, and the job asks for 2"),
        ({"nodes_from": "openmpi", "launcher": "local", "num_nodes": 1}, "--num_nodes 1: .*\n--launcher local"),
    ],
)
def test_what_could_only_fail_once_the_job_runs_is_refused_before_it_waits(cluster, tmp_path, own, message):
    folder = JobFolder.of_pretraining(tmp_path / "out", "gpt")
    with pytest.raises(UserError, match=message):
        hand_in(cluster, folder, own=ClusterSettings(**own), job_nodes=2, parallel_environment="mpi")
    assert cluster.submitted() == [] and not (tmp_path / "out").exists()


def test_another_schedulers_nodes_and_launcher_are_refused():
    job = SubmitSettings(submit="pbs", job_nodes=2)
    first, second = submission.problems(job, ClusterSettings(nodes_from="slurm", launcher="srun"))
    assert first.startswith("--launcher srun is Slurm's") and second.startswith("--nodes_from slurm: the job is for")
    for source in ("auto", "none", "pbs", "openmpi"):
        assert list(submission.problems(job, ClusterSettings(nodes_from=source, num_nodes=2, launcher="pdsh"))) == []
