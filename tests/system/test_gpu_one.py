"""One GPU: Megatron-DeepSpeed trains, resumes, exports, verifies, is finetuned and answers; transformers resumes.

Needs an NVIDIA GPU, and a Megatron-DeepSpeed checkout for its engine. Takes two minutes each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gpu_runs  # type: ignore[import-not-found]
import pytest
import runs  # type: ignore[import-not-found]

from train.cluster.allocation import count_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 1, reason="needs an NVIDIA GPU"),
]
_GENERATE = runs.FINETUNE.with_name("generate.sh")
_ONE_GPU: dict[str, object] = {"num_processes": 1, "micro_batch_size": 0}


def finetune_and_ask(model: Path, folder: Path, **more: object) -> str:
    """Four steps of finetuning on a few conversations, and one answer."""
    talks = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."}] for n in range(64)
    ]
    data = folder / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    given: dict[str, object] = {
        "model_name_or_path": model, "data_files": data, "output_dir": folder / "chat", "max_seq_length": 64,
        "max_steps": 4, "bf16": True, "learning_rate": 1e-3, "logging_steps": 1, "num_processes": 1, "device": "cuda",
    }  # fmt: skip
    gpu_runs.run(["bash", str(runs.FINETUNE), *runs.flags({**given, **more})])
    asked = {"model_name_or_path": folder / "chat", "prompt": "What is 3?", "max_new_tokens": 8, "device": "cuda"}
    return str(gpu_runs.run(["bash", str(_GENERATE), *runs.flags(asked), "--json"]))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_megatron_deepspeed_from_training_to_answers(method: str, corpus: Path, tmp_path: Path) -> None:
    gpu_runs.require_engine()
    shapes = {"full": gpu_runs.SHAPES["gpt"], "lora": {**gpu_runs.SHAPES["llama"], "activation_checkpoint": True}}
    command = gpu_runs.pretrain(corpus, tmp_path, engine="megatron-deepspeed", **{**shapes[method], **_ONE_GPU})
    before = gpu_runs.train(command, tmp_path)
    after = gpu_runs.go_on(command, tmp_path)
    assert after == pytest.approx(before, rel=1e-3)  # sums of atomic additions may differ from run to run
    logits = gpu_runs.export(corpus, tmp_path)
    answer = json.loads(finetune_and_ask(tmp_path / "hf", tmp_path, method=method).splitlines()[-1])
    assert answer["tokens"] > 0
    print(f"{method}: losses {before}, after resuming {after}, logits {logits}, answer {answer}")


def test_transformers_trains_compiled_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    command = gpu_runs.pretrain(corpus, tmp_path, engine="transformers", **{**gpu_runs.SHAPES["gpt"], **_ONE_GPU})
    before = gpu_runs.train(command, tmp_path, says="torch.compile: on")
    after = gpu_runs.go_on(command, tmp_path)
    assert after == pytest.approx(before, rel=1e-3)
    print(f"transformers: losses {before}, after resuming {after}")
