"""The transformers engine for real: it trains, saves, resumes exactly, spreads over ranks, stops at NaN."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train.data.indexed_dataset import IndexedDatasetWriter

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("transformers_engine")]
TINY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 32, "train_tokens": 1024,
    "global_batch_size": 4, "micro_batch_size": 2, "lr": "1e-2", "precision": "fp32", "device": "cpu",
    "engine": "transformers", "split": "90,10,0", "save_interval": 4, "eval_interval": 4, "eval_iters": 1,
    "log_interval": 1, "job_name": "tiny",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, Path]:
    """A small tokenizer and a corpus of arithmetic that it can be read from: (model file, data folder)."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"{a} plus {b} is {a + b}" for a in range(40) for b in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "t"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<s>", "</s>", "<pad>", "<EOD>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t.model"))
    (folder / "data").mkdir()
    end = processor.piece_to_id("<EOD>")
    prefix = str(folder / "data" / "sums_text_document")
    with IndexedDatasetWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), np.dtype(np.uint16)) as writer:
        for line in lines:
            writer.add_document(np.array([*processor.encode(line), end], dtype=np.uint16))
    return folder / "t.model", folder / "data"


@pytest.fixture
def pretrain(launch, corpus):
    """Runs pretrain.sh on the corpus; flags win over TINY."""

    def run(output: Path, **flags: object) -> subprocess.CompletedProcess[str]:
        return launch("step2_pretrain_model/pretrain.sh", *arguments(corpus, output, **flags))

    return run


def arguments(corpus: tuple[Path, Path], output: Path, **flags: object) -> list[str]:
    paths = {"input_tokenizer_file": corpus[0], "data_path": corpus[1], "output_model_dir": output}
    return [word for name, value in {**TINY, **paths, **flags}.items() for word in (f"--{name}", str(value))]


def losses(output: Path) -> dict[int, float]:
    lines = (output / "metrics" / "tiny.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


def weights(output: Path, step: int):
    from safetensors.torch import load_file

    return load_file(output / "checkpoint" / "tiny" / f"global_step{step}" / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(launch, corpus, tmp_path_factory) -> Path:
    """An uninterrupted run of 8 steps, in a folder that needs quoting."""
    output = tmp_path_factory.mktemp("whole run")
    done = launch("step2_pretrain_model/pretrain.sh", *arguments(corpus, output))
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_the_loss_falls_and_everything_is_written(whole_run):
    curve = losses(whole_run)
    assert sorted(curve) == list(range(1, 9))
    assert curve[8] < curve[1] - 0.5
    step = whole_run / "checkpoint" / "tiny" / "global_step8"
    assert {"model.safetensors", "config.json", "golden_logits.safetensors", "optimizer.pt"} <= {
        file.name for file in step.iterdir()
    }
    assert (step.parent / "latest").read_text() == "global_step8"
    assert list((whole_run / "tensorboard" / "tiny").glob("events.*"))
    record = json.loads((whole_run / "manifest" / "tiny.json").read_text())
    assert record["results"]["tokens"] == 1024
    assert record["results"]["last_loss"] == curve[8]
    assert record["results"]["loss_curve"] == [[step, loss] for step, loss in curve.items()]
    assert record["results"]["eval_loss"] < curve[1]


def test_golden_logits_are_those_of_the_saved_weights(whole_run):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    step = whole_run / "checkpoint" / "tiny" / "global_step8"
    golden = load_file(step / "golden_logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(step).eval()
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert golden["logits"].shape == (1, 32, model.config.vocab_size)
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-5)


def test_a_finished_run_has_nothing_to_do(whole_run, pretrain):
    before = (whole_run / "manifest" / "tiny.json").read_text()
    again = pretrain(whole_run)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (whole_run / "manifest" / "tiny.json").read_text() == before


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole_run, corpus, tmp_path, project_root, pretrain):
    """SIGKILL of the worker after step 4 is saved; the restarted run ends with the same losses and weights."""
    output = tmp_path / "killed"
    script = str(project_root / "scripts/step2_pretrain_model/pretrain.py")
    running = subprocess.Popen(
        [sys.executable, script, *arguments(corpus, output, train_tokens=1024)], stdout=subprocess.DEVNULL
    )
    saved = output / "checkpoint" / "tiny" / "global_step4"
    deadline = time.monotonic() + 240
    while not saved.is_dir():
        assert running.poll() is None and time.monotonic() < deadline, "it ended before step 4 was saved"
        time.sleep(0.01)
    subprocess.run(["pkill", "-KILL", "-f", f"worker --recipe {output}"], check=True)
    assert running.wait(timeout=60) == 137, "a rank that is killed is a failure, with its own status"
    shutil.rmtree(output / "checkpoint" / "tiny" / "global_step8", ignore_errors=True)  # in case it was quicker
    half = output / "checkpoint" / "tiny" / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_text("half-written")
    again = pretrain(output)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "goes on from step 4" in again.stdout
    assert losses(output) == losses(whole_run)
    for name, value in weights(whole_run, 8).items():
        assert bool((weights(output, 8)[name] == value).all()), name


@pytest.mark.parametrize("flags", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3, "offload": "all"}])
def test_two_ranks_learn_what_one_does(whole_run, pretrain, tmp_path, flags):
    """The same global batches over two ranks: losses equal to rounding, whatever ZeRO spreads."""
    done = pretrain(tmp_path, num_processes=2, micro_batch_size=1, **flags)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = losses(whole_run), losses(tmp_path)
    assert two == pytest.approx(one, rel=2e-4)
    assert weights(tmp_path, 8).keys() >= weights(whole_run, 8).keys()  # DeepSpeed writes the tied head out again
    if flags["zero_stage"] == 3:
        wrong = pretrain(
            tmp_path, num_processes=1, micro_batch_size=1, train_tokens=2048, lr_decay_tokens=1024, **flags
        )
        assert wrong.returncode == 2
        assert "processes: 2 there, 1 now" in wrong.stderr


@pytest.mark.parametrize(
    "flags",
    [
        {"architecture": "llama", "num_key_value_heads": 2, "precision": "bf16", "activation_checkpoint": True},
        {"architecture": "mistral", "num_key_value_heads": 2, "attention": "eager", "lr_decay_style": "linear"},
    ],
    ids=lambda flags: flags["architecture"],
)
def test_other_families_and_formats_train(pretrain, tmp_path, flags):
    done = pretrain(tmp_path, **flags)
    assert done.returncode == 0, done.stdout + done.stderr
    curve = losses(tmp_path)
    assert curve[8] < curve[1] - 0.3
    config = json.loads((tmp_path / "checkpoint" / "tiny" / "global_step8" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == (flags["architecture"], 2)


def test_keep_last_and_w_and_b_offline(pretrain, tmp_path):
    done = pretrain(tmp_path, keep_last=1, wandb_project="p", wandb_entity="e", wandb_tag="t", save_interval=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [folder.name for folder in (tmp_path / "checkpoint" / "tiny").glob("*step*")] == ["global_step8"]
    assert "W&B: offline" in done.stdout
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_loss_that_is_no_number_stops_the_run_with_its_own_code(pretrain, tmp_path):
    """A learning rate that blows the weights up: exit code 4, and the checkpoint from before is named and whole."""
    done = pretrain(tmp_path, lr="1e36", clip_grad=0, lr_warmup_tokens=640, save_interval=1, train_tokens=4096)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "became NaN or infinite" in done.stderr
    assert not (tmp_path / "manifest" / "tiny.json").exists()
    kept = sorted((tmp_path / "checkpoint" / "tiny").glob("global_step*"), key=lambda folder: int(folder.name[11:]))
    assert kept, "the weights before the first step of the warm-up are finite"
    assert str(kept[-1]) in done.stderr
    assert all(np.isfinite(value.numpy()).all() for value in weights(tmp_path, int(kept[-1].name[11:])).values())


def test_another_model_does_not_go_on_from_these_checkpoints(whole_run, pretrain):
    done = pretrain(whole_run, hidden_size=64)
    assert done.returncode == 2
    assert (
        "holds another run (model ffn_hidden_size: 128 there, 256 now; model hidden_size: 32 there, 64 now)"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"weight_decay": 0.9}, "training weight_decay: 0.1 there, 0.9 now"),
        ({"zero_stage": 1}, "zero_stage: 0 there, 1 now"),
        ({"global_batch_size": 8}, "training global_batch_size: 4 there, 8 now"),
        ({"train_tokens": 2048}, "training lr_decay_tokens: 1024 there, 2048 now"),
        ({"train_tokens": 512}, "training train_tokens: 1024 there, 512 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_does_not_go_on_as_another_one(whole_run, pretrain, flags, difference):
    """Its manifest would tell of a training that never was."""
    before = (whole_run / "manifest" / "tiny.json").read_text()
    done = pretrain(whole_run, **flags)
    assert done.returncode == 2, done.stdout
    assert difference in done.stderr
    assert (whole_run / "manifest" / "tiny.json").read_text() == before


def test_more_tokens_under_the_same_decay_go_on(pretrain, tmp_path):
    """And the manifest tells of both parts; what is not part of a run's identity may change."""
    assert pretrain(tmp_path, train_tokens=512, lr_decay_tokens=1024).returncode == 0
    done = pretrain(tmp_path, train_tokens=1024, lr_decay_tokens=1024, log_interval=2, save_interval=3, keep_last=2)
    assert done.returncode == 0, done.stderr
    assert "--train_tokens grows from 512 to 1,024" in done.stdout
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 6, 8]
    assert json.loads((tmp_path / "manifest" / "tiny.json").read_text())["results"]["tokens"] == 1024


def test_overwrite_takes_nothing_away_before_the_run_can_start(whole_run, pretrain):
    before = sorted(file.name for file in (whole_run / "checkpoint" / "tiny").iterdir())
    assert pretrain(whole_run, overwrite="True", precision="fp16").returncode == 2
    assert sorted(file.name for file in (whole_run / "checkpoint" / "tiny").iterdir()) == before
    assert (whole_run / "manifest" / "tiny.json").exists()


def test_a_killed_rank_is_no_interruption(corpus, tmp_path, project_root):
    """SIGKILL of one rank of two, as out-of-memory does: exit code 1, not the 130 that schedulers try again."""
    script = str(project_root / "scripts/step2_pretrain_model/pretrain.py")
    words = arguments(corpus, tmp_path, train_tokens="10M", num_processes=2, micro_batch_size=1)
    running = subprocess.Popen(
        [sys.executable, script, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics" / "tiny.jsonl").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-f", f"worker --recipe {tmp_path}"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(found) == 2
    subprocess.run(["kill", "-KILL", found[-1]], check=True)
    assert running.wait(timeout=90) == 137
    assert "rank 1 was killed by SIGKILL" in running.stderr.read()


def test_two_launches_of_one_run_do_not_meet(corpus, tmp_path, project_root, pretrain):
    script = str(project_root / "scripts/step2_pretrain_model/pretrain.py")
    running = subprocess.Popen(
        [sys.executable, script, *arguments(corpus, tmp_path, train_tokens="10M")], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics" / "tiny.jsonl").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    second = pretrain(tmp_path, train_tokens="10M")
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    assert second.returncode == 2 and "is being made by another process" in second.stderr


def test_the_saved_recipe_gives_the_same_run_from_any_folder(whole_run, launch, tmp_path):
    again = launch("step2_pretrain_model/pretrain.py", "--recipe", whole_run / "recipe" / "tiny.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout


def test_ctrl_c_ends_it_with_130(corpus, tmp_path, project_root):
    script = str(project_root / "scripts/step2_pretrain_model/pretrain.py")
    running = subprocess.Popen(
        [sys.executable, script, *arguments(corpus, tmp_path, train_tokens="10M")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics" / "tiny.jsonl").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert "interrupted" in running.stderr.read()


def test_a_full_disk_while_saving_is_one_message(corpus, tmp_path, project_root):
    """Somebody else fills the disk once step 400 is saved; step 800's checkpoint no longer fits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights that this user does not have")
    flags = {"train_tokens": 800 * 4 * 32, "save_interval": 400, "eval_interval": 0, "log_interval": 400}
    script = str(project_root / "scripts/step2_pretrain_model/pretrain.py")
    try:
        running = subprocess.Popen(
            [sys.executable, script, *arguments(corpus, disk, **flags)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not (disk / "checkpoint" / "tiny" / "global_step400").is_dir():
            assert running.poll() is None, "it ended before step 400 was saved"
            time.sleep(0.01)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        _, said = running.communicate(timeout=240)
        assert running.returncode == 2, said
        assert "no space left" in said and "Traceback" not in said
        assert [step.name for step in (disk / "checkpoint" / "tiny").iterdir() if step.is_dir()] == ["global_step400"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
