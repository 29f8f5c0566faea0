"""Runs inside real Slurm and Grid Engine jobs, submitted by this project: exit codes, limits, pre-emption, chains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import runs  # type: ignore[import-not-found]
from grid_engine import GridEngine  # type: ignore[import-not-found]
from hosts import Hosts, wait_until  # type: ignore[import-not-found]
from slurm import Slurm  # type: ignore[import-not-found]

from train import settings
from train.engine.megatron_deepspeed import checkout

_SEEDS = "gcp_honban_node-2_gpu-16"
_LONG: dict[str, object] = {"train_tokens": "100M", "save_interval": 1_000_000, "lr_decay_tokens": "100M"}


def submit(scheduler: Slurm | GridEngine, command: list[str], **more: object) -> tuple[str, Path]:
    """Submits a run as its user does, on the host where users log in; the job's id and its log."""
    name = "slurm" if isinstance(scheduler, Slurm) else "gridengine"
    given: dict[str, object] = {"submit": name, "job_nodes": 2, **more}
    if name == "gridengine":
        given = {"parallel_environment": "mpi", **given}
    done = scheduler.run(*command, *runs.flags(given), env=runs.ENVIRONMENT, timeout_s=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"jobs? ([\d, ]+) \(", done.stdout)
    log = re.search(r"^log: +(.*)$", done.stdout, re.MULTILINE)
    assert found and log, done.stdout
    return found[1], Path(log[1])


def test_a_slurm_job_trains_on_both_nodes(slurm: Slurm, hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    job, log = submit(slurm, runs.pretrain(corpus, tmp_path / "out"))
    facts = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=180)
    said = log.read_text()
    assert facts["JobState"] == "COMPLETED" and facts["ExitCode"] == "0:0", said
    assert "Slurm job" in said and "world size 2" in said
    assert sorted(runs.losses(tmp_path / "out")) == list(range(1, runs.STEPS + 1))
    assert not hosts.strays("node1") and not hosts.strays("node2")
    status = slurm.run("bash", str(runs.STATUS), str(tmp_path / "out"), "--json", env=runs.ENVIRONMENT)
    assert f'"last_step": {runs.STEPS}' in status.stdout or f'"step": {runs.STEPS}' in status.stdout, status.stdout


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_processes": 2}])
def test_megatron_deepspeed_in_a_slurm_job(slurm: Slurm, corpus: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    job, log = submit(slurm, runs.pretrain(corpus, tmp_path / "out", engine="megatron-deepspeed", **sizes))
    facts = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=300)
    assert facts["JobState"] == "COMPLETED", log.read_text()
    assert sorted(runs.losses(tmp_path / "out")) == list(range(1, runs.STEPS + 1))


def test_a_failure_is_seen_by_slurm(slurm: Slurm, hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    job, log = submit(slurm, runs.pretrain(corpus, tmp_path / "out", **_LONG))
    wait_until(lambda: len(runs.losses(tmp_path / "out")) > 3, f"the run to train; see {log}", 120)
    (victim,) = runs.hosts_of_ranks(hosts, "node2")
    runs.kill(victim)
    facts = slurm.wait_for(job, "FAILED", "COMPLETED", timeout_s=60)
    assert facts["JobState"] == "FAILED" and facts["ExitCode"] == "137:0", facts
    assert "rank 1 on node2 was killed by SIGKILL" in log.read_text()
    wait_until(lambda: not hosts.strays("node1") and not hosts.strays("node2"), "both nodes to be quiet")


def test_a_job_that_slurm_ends_at_its_limit_saves_first(
    slurm: Slurm, hosts: Hosts, corpus: Path, tmp_path: Path
) -> None:
    job, log = submit(slurm, runs.pretrain(corpus, tmp_path / "out", **_LONG))
    wait_until(lambda: len(runs.losses(tmp_path / "out")) > 3, f"the run to train; see {log}", 120)
    slurm.reach_limit(job)
    slurm.wait_for(job, "TIMEOUT", timeout_s=120)
    wait_until(lambda: not hosts.strays("node1") and not hosts.strays("node2"), "both nodes to be quiet")
    assert "ended early (asked by SIGTERM)" in log.read_text()
    assert list((tmp_path / "out" / "checkpoint" / "tiny").glob("global_step*")), log.read_text()


def test_a_preempted_job_saves_and_goes_on(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 5\n")
    long: dict[str, object] = {"train_tokens": 600 * 4 * 32, "lr_decay_tokens": "1M", "save_interval": 1_000_000}
    job, log = submit(slurm, runs.pretrain(corpus, tmp_path / "out", **long), job_cpus_per_node=4)
    wait_until(lambda: len(runs.losses(tmp_path / "out")) > 3, f"the run to train; see {log}", 120)
    slurm.submit("--partition=urgent", "--nodes=2", "--cpus-per-task=4", script)
    facts = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", timeout_s=240)
    said = log.read_text()
    assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "1", said
    assert "ended early (asked by SIGTERM)" in said and "goes on from step" in said, said
    assert sorted(runs.losses(tmp_path / "out")) == list(range(1, 601))


def test_a_run_longer_than_its_limit_is_a_chain(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """The first job's time budget ends before the run does, and the second goes on."""
    slow: dict[str, object] = {"train_tokens": 2500 * 4 * 32, "lr_decay_tokens": "1M", "save_interval": 1_000_000}
    command = runs.pretrain(corpus, tmp_path / "out", **slow)
    jobs, log = submit(slurm, command, num_jobs=2, wall_time="00:05:00", save_margin_min=4.6)
    first, second = jobs.split(", ")
    slurm.wait_for(second, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", timeout_s=240)
    assert slurm.facts(first)["ExitCode"] == "130:0"
    saved = re.search(r"saved step ([\d,]+) and ended early \(the time budget is used up\)", log.read_text())
    assert saved is not None, log.read_text()
    said = log.with_name(f"tiny.{second}.log").read_text()
    assert f"goes on from step {saved[1]}" in said and "loss" in said, said
    found = runs.losses(tmp_path / "out")
    assert sorted(found) == list(range(1, len(found) + 1)) and len(found) > int(saved[1].replace(",", ""))


def test_the_seeds_commands_as_written_in_a_slurm_job(slurm: Slurm, hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    """Steps 2 and 4 of the seeds, argument for argument; TRAIN_RECIPE names small models instead of theirs."""
    scripts = runs.PRETRAIN.parents[1]
    tiny = {**runs.TINY, "data_path": [str(corpus / "text_text_document")]}
    write_recipe(tmp_path / "step2.yaml", "pretrain", {k: v for k, v in tiny.items() if k != "save_interval"})
    small = {"num_train_epochs": 1, "max_steps": 2, "device": "cpu", "num_processes": 1, "zero_stage": 3,
             "data_files": [str(runs.write_conversations(tmp_path))], "use_wandb": True,
             "show_examples": 0}  # fmt: skip
    write_recipe(tmp_path / "step4.yaml", "finetune", small)
    model = runs.make_model(hosts, corpus, tmp_path)
    step2 = "dataset-book_wikija_tokenizer-sentencepiece_model-gpt_1.3B/"
    step2 += "zero-0_dp-16_pp-1_tp-1_precision-fp32_flashattn2-on.sh"
    job = tmp_path / "job.sh"
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in runs.ENVIRONMENT.items())
    job.write_text(
        f"""#!/bin/bash
set -euo pipefail
{exports}cd {shlex.quote(str(scripts))}/step2_pretrain_model
TRAIN_RECIPE={tmp_path}/step2.yaml bash ./{_SEEDS}/{step2} \\
    --input_tokenizer_file {corpus}/tok.model \\
    --output_model_dir {tmp_path}/step2/ \\
    --save_interval 1000 \\
    --wandb_entity team \\
    --wandb_project project
cd {shlex.quote(str(scripts))}/step4_finetune_model
TRAIN_RECIPE={tmp_path}/step4.yaml bash ./{_SEEDS}/dataset-openassistant/launcher-deepspeed_zero-3.sh \\
    --input_model_name_or_path {model} \\
    --input_max_seq_length 64 \\
    --output_tokenizer_and_model_dir {tmp_path}/step4/ \\
    --wandb_entity team \\
    --wandb_project project \\
    --wandb_tag other_gpu
"""
    )
    job_id = slurm.submit("--nodes=2", f"--output={tmp_path}/log", job)
    facts = slurm.wait_for(job_id, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=300)
    said = (tmp_path / "log").read_text()
    assert facts["JobState"] == "COMPLETED", said
    assert said.count("node[1-2]") >= 2
    results = json.loads((tmp_path / "step4" / "manifest.json").read_text())["results"]
    assert results["layout"]["world_size"] == 2 and results["layout"]["zero_stage"] == 3
    assert len(list((tmp_path / "step2" / "wandb").glob("offline-run-*"))) == 2, "one W&B run for each node"


def write_recipe(file: Path, kind: str, given: dict[str, Any]) -> None:
    """Flags as a recipe file."""
    if kind == "pretrain":
        from train.recipe import PretrainRecipe as Kind
    else:
        from train.finetune.settings import FinetuneSettings as Kind  # type: ignore[assignment]
    import yaml

    tree: dict[str, Any] = {}
    for leaf in settings._leaves(Kind):
        if leaf.name in given:
            settings._put(tree, leaf.path, given[leaf.name])
    file.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize("launcher", ["auto", "openmpi"])
def test_a_grid_engine_job_trains_on_both_nodes(
    grid_engine: GridEngine, hosts: Hosts, corpus: Path, tmp_path: Path, launcher: str
) -> None:
    job, log = submit(grid_engine, runs.pretrain(corpus, tmp_path / "out", launcher=launcher))
    facts = grid_engine.wait_for(job, timeout_s=180)
    assert facts["exit_status"] == "0" and facts["failed"].startswith("0"), log.read_text()
    assert "Grid Engine" in log.read_text() and "world size 2" in log.read_text()
    assert sorted(runs.losses(tmp_path / "out")) == list(range(1, runs.STEPS + 1))
    assert not hosts.strays("node1") and not hosts.strays("node2")


def test_megatron_deepspeed_in_a_grid_engine_job_as_on_abci(
    grid_engine: GridEngine, corpus: Path, tmp_path: Path
) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    command = runs.pretrain(corpus, tmp_path / "out", engine="megatron-deepspeed")
    job, log = submit(grid_engine, command, parallel_environment="", resource="rt_F", wall_time="00:20:00")
    facts = grid_engine.wait_for(job, timeout_s=300)
    assert facts["exit_status"] == "0", log.read_text()
    assert sorted(runs.losses(tmp_path / "out")) == list(range(1, runs.STEPS + 1))


def test_finetuning_under_zero_3_in_a_grid_engine_job(
    grid_engine: GridEngine, hosts: Hosts, corpus: Path, tmp_path: Path
) -> None:
    model = runs.make_model(hosts, corpus, tmp_path)
    job, log = submit(grid_engine, runs.finetune(model, tmp_path / "tuned", zero_stage=3))
    facts = grid_engine.wait_for(job, timeout_s=240)
    assert facts["exit_status"] == "0", log.read_text()
    results = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["results"]
    assert results["layout"]["world_size"] == 2


def test_a_failure_is_seen_by_grid_engine(grid_engine: GridEngine, hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    job, log = submit(grid_engine, runs.pretrain(corpus, tmp_path / "out", **_LONG))
    wait_until(lambda: len(runs.losses(tmp_path / "out")) > 3, f"the run to train; see {log}", 120)
    ranks = [pid for name in ("node1", "node2") for pid in runs.hosts_of_ranks(hosts, name)]
    assert len(ranks) == 2
    runs.kill(ranks[1])
    facts = grid_engine.wait_for(job, timeout_s=60)
    assert facts["exit_status"].split()[0] == "137", facts
    assert "was killed by SIGKILL" in log.read_text()
