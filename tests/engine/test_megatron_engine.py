"""The real Megatron-DeepSpeed on CPU processes: it trains, saves, exports with equal logits, resumes, stops at NaN."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from megatron_tiny_run import VOCABULARY, flags

from train.checkpoint.megatron.export import export
from train.engine.megatron_deepspeed.patches import DISABLED_VARIABLE
from train.errors import EXIT_NON_FINITE_LOSS, EXIT_USER

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]
TP2_PP2 = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_processes": 4}


@pytest.fixture(scope="module")
def pretrain(launch: Any, corpus: Path, output: Path) -> Any:
    """Runs pretrain.sh with the tiny recipe; flags win over it."""

    def run(job_name: str, *, disabled: str = "", **more: object) -> subprocess.CompletedProcess[str]:
        words = flags(corpus, output, job_name=job_name, **more)
        return launch("step2_pretrain_model/pretrain.sh", *words, environment={DISABLED_VARIABLE: disabled})

    return run


@pytest.fixture(scope="module")
def tp2_pp2(pretrain: Any, output: Path) -> Path:
    """The checkpoint folder of a finished run in TP2 x PP2."""
    done = pretrain("tp2_pp2", **TP2_PP2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "world size 4 = 2 tensor x 2 pipeline x 1 data parallel" in done.stdout
    return output / "checkpoint" / "tp2_pp2"


def metrics(output: Path, job_name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics" / f"{job_name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def distance_to_golden(step_dir: Path, folder: Path, **changes: object) -> float:
    """Largest difference of the exported model's logits to the engine's own, relative to the largest of them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    export(step_dir, folder, vocab_size=VOCABULARY, model_max_length=32)
    config = AutoConfig.from_pretrained(folder, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    golden = load_file(step_dir / "golden_logits.safetensors")
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    expected = golden["logits"][..., :VOCABULARY]
    return float((logits - expected).abs().max() / expected.abs().max())


def test_tp2_pp2_learns_and_says_so(tp2_pp2: Path, output: Path) -> None:
    losses = [record["loss"] for record in metrics(output, "tp2_pp2") if "loss" in record]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert [record["step"] for record in metrics(output, "tp2_pp2") if "eval_loss" in record][:2] == [4, 8]
    record = json.loads((output / "manifest" / "tp2_pp2.json").read_text())["results"]
    assert record["first_loss"] == losses[0] and record["last_loss"] == losses[-1]
    assert len(record["engine_commit"]) == 40
    assert sorted(path.name for path in tp2_pp2.iterdir() if path.is_dir()) == ["global_step4", "global_step8"]
    assert (tp2_pp2 / "latest").read_text() == "global_step8"


def test_tp2_pp2_exports_to_the_engines_own_logits(tp2_pp2: Path, tmp_path: Path) -> None:
    assert distance_to_golden(tp2_pp2 / "global_step8", tmp_path / "hf") < 1e-5
    # the weights are large enough that the other GELU would show
    assert distance_to_golden(tp2_pp2 / "global_step8", tmp_path / "erf", activation_function="gelu") > 5e-5


def test_resumes_to_the_same_losses(tp2_pp2: Path, pretrain: Any, output: Path) -> None:
    again = tp2_pp2.with_name("again")
    shutil.copytree(tp2_pp2, again)
    identity = (output / "recipe" / "tp2_pp2.identity.json").read_text()
    (output / "recipe" / "again.identity.json").write_text(identity.replace('"tp2_pp2"', '"again"'))
    (again / "global_step8").rename(again / ".global_step8.unfinished-save")  # as a run killed while saving leaves it
    done = pretrain("again", **TP2_PP2, profile_step=6)  # which changes no number
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summaries = [f"step6_rank{rank}.json" for rank in range(4)]
    assert sorted(file.name for file in (output / "profile" / "again").glob("*k?.json")) == summaries
    expected = [record for record in metrics(output, "tp2_pp2") if record["step"] > 4]
    assert metrics(output, "again") == expected
    assert not list(again.glob(".global_step*"))


def test_patches_that_are_not_needed_change_no_loss(tp2_pp2: Path, pretrain: Any, output: Path) -> None:
    done = pretrain("bare", disabled="cpu-kernels,golden-logits,whole-checkpoints", **TP2_PP2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with_patches, without = metrics(output, tp2_pp2.name), metrics(output, "bare")
    losses, bare_losses = ([record["loss"] for record in run if "loss" in record] for run in (with_patches, without))
    assert bare_losses == pytest.approx(losses, rel=1e-5)
    assert not list((output / "checkpoint" / "bare").glob("global_step*/golden*"))


def test_without_pipeline_module_zero1_bf16_and_wandb(
    pretrain: Any, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    layout = {"tensor_parallel_size": 2, "num_processes": 2, "no_pipeline_parallel": True, "zero_stage": 1}
    done = pretrain("plain", precision="bf16", wandb_project="tests", **layout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(output.glob("wandb/offline-run-*/run-*.wandb"))) == 1  # one a node
    step_dir = output / "checkpoint" / "plain" / "global_step8"
    assert not list(step_dir.glob("layer_*"))
    assert distance_to_golden(step_dir, tmp_path / "hf") < 4 * 2.0**-7


def test_non_finite_loss_has_its_own_exit_code(pretrain: Any) -> None:
    done = pretrain("nan", num_processes=1, lr="1e30", min_lr="1e29", lr_warmup_tokens=0)
    assert done.returncode == EXIT_NON_FINITE_LOSS, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the loss became NaN or infinite at or before step" in done.stderr


@pytest.mark.parametrize(("eval_interval", "what"), [(0, "the weights"), (1, "the evaluation loss")])
def test_a_last_step_that_diverges_saves_nothing(pretrain: Any, output: Path, eval_interval: int, what: str) -> None:
    """The loss of the last step is that of the weights before it. Only the last pipeline stage has logits."""
    job, tokens = f"diverged_{eval_interval}", 4 * 32  # of one step; the warm-up leaves the first at a rate of 0
    done = pretrain(
        job, pipeline_parallel_size=2, num_processes=2, lr="1e30", min_lr="1e29", clip_grad=0, save_interval=1,
        train_tokens=2 * tokens, lr_warmup_tokens=tokens, eval_interval=eval_interval,
    )  # fmt: skip
    assert done.returncode == EXIT_NON_FINITE_LOSS, done.stdout[-3000:] + done.stderr[-3000:]
    good = output / "checkpoint" / job / "global_step1"
    assert f"{what} became NaN or infinite at or before step 2; the last good checkpoint is {good}." in done.stderr
    assert [path.name for path in good.parent.glob("*global_step*")] == ["global_step1"]
    assert (good.parent / "latest").read_text() == "global_step1"
    assert not (output / "manifest" / f"{job}.json").exists()
    assert [record["step"] for record in metrics(output, job) if "loss" in record] == [1, 2]


def test_what_does_not_fit_is_refused_before_anything_starts(pretrain: Any, output: Path) -> None:
    done = pretrain("unfit", tensor_parallel_size=2, pipeline_parallel_size=2, num_processes=3)
    assert done.returncode == EXIT_USER and "world size 3 = 2 tensor x 2 pipeline" in done.stderr
    assert not (output / "checkpoint" / "unfit").exists()


def test_a_llama_in_sequence_parallel_is_the_llama_without(pretrain: Any, output: Path, tmp_path: Path) -> None:
    """Without the patch the norms of the two tensor ranks drift apart; with it nothing changes but the memory."""
    layout = {"tensor_parallel_size": 2, "num_processes": 2}
    shape = {"architecture": "llama", "num_key_value_heads": 2, "ffn_hidden_size": 24, "rope_theta": 5e4}
    for job, more in (("llama", {}), ("llama_sp", {"sequence_parallel": True})):
        done = pretrain(job, **layout, **shape, **more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plain, split = ([r["loss"] for r in metrics(output, job) if "loss" in r] for job in ("llama", "llama_sp"))
    assert split == pytest.approx(plain, rel=1e-6)
    assert distance_to_golden(output / "checkpoint" / "llama_sp" / "global_step8", tmp_path / "hf") < 1e-5


def test_sequence_parallel_in_bf16_sums_once_a_step(pretrain: Any, output: Path, tmp_path: Path) -> None:
    layout = {
        "tensor_parallel_size": 2,
        "num_processes": 2,
        "precision": "bf16",
        "zero_stage": 1,
        "micro_batch_size": 1,
    }
    for job, more in (("bf16_tp", {}), ("bf16_sp", {"sequence_parallel": True})):
        done = pretrain(job, **layout, **more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "saved global_step8: " in done.stdout
    plain, split = ([r["loss"] for r in metrics(output, job) if "loss" in r] for job in ("bf16_tp", "bf16_sp"))
    assert len(plain) == 8 and split == pytest.approx(plain, rel=2e-2)
    # the export refuses weights that every rank keeps and the ranks disagree on
    assert distance_to_golden(output / "checkpoint" / "bf16_sp" / "global_step8", tmp_path / "hf") < 3e-2


def test_sequence_parallel_stages_hand_over_their_own_shares(tp2_pp2: Path, pretrain: Any, output: Path) -> None:
    """DeepSpeed would put one stream together from parts of different shares: no error, and a wrong loss."""
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_processes": 4}
    done = pretrain("sp_pp2", **layout, sequence_parallel=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plain, split = ([r["loss"] for r in metrics(output, job) if "loss" in r] for job in (tp2_pp2.name, "sp_pp2"))
    assert len(plain) == 8 and split == pytest.approx(plain, rel=1e-6)


def test_gpts_positions_and_biases_in_sequence_parallel(pretrain: Any, output: Path, tmp_path: Path) -> None:
    layout = {"tensor_parallel_size": 2, "num_processes": 2, "sequence_parallel": True}
    done = pretrain("gpt_sp", **layout, log_optimizer_state=True, zero_stage=1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # the export refuses weights that every rank keeps and the ranks disagree on
    assert distance_to_golden(output / "checkpoint" / "gpt_sp" / "global_step8", tmp_path / "hf") < 1e-5


def test_further_arguments_reach_the_engine(pretrain: Any, output: Path) -> None:
    more = {"megatron_arguments": "--log-world-size-to-tensorboard --hysteresis 3", "zero_stage": 2}
    done = pretrain("further", num_processes=2, no_pipeline_parallel=True, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "hysteresis ...................................... 3" in done.stdout
