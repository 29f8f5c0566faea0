"""The real Megatron-DeepSpeed begins with the weights of a Hugging Face folder: its logits are the folder's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_tiny_run import VOCABULARY, flags, write_corpus

from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model
from train.checkpoint.verify import LOGITS_TOLERANCE, read_golden_logits
from train.engine.megatron_deepspeed import checkout

pytestmark = [pytest.mark.slow, pytest.mark.megatron, pytest.mark.xdist_group("megatron_engine")]
LLAMA = {
    "architecture": "llama", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
    "ffn_hidden_size": 24, "rope_theta": 70, "norm_epsilon": 1e-4,
}  # fmt: skip
# The rate moves no weight within the number's precision; the loss of both steps is that of the folder's weights.
STILL = {"lr": "1e-20", "min_lr": "1e-21", "train_tokens": 2 * 4 * 32, "save_interval": 1, "eval_interval": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and data in one folder."""
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def make_model(folder: Path, architecture: str) -> Any:
    """A random model, whose weights are large enough that a wrong layout shows; also written into `folder`."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(4)
    if architecture == "gpt2":
        config: Any = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCABULARY)
        std = 0.1  # bf16 rounds what larger weights make of it beyond its allowance
    else:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            max_position_embeddings=32, vocab_size=VOCABULARY, rms_norm_eps=1e-4,
            rope_parameters={"rope_type": "default", "rope_theta": 70.0},
        )  # fmt: skip
        std = 0.4
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, std)
    model.save_pretrained(folder)
    return model.eval()


def distance(model: Any, step_dir: Path) -> float:
    """Of the engine's logits to the model's, relative to the largest."""
    input_ids, golden, _ = read_golden_logits(step_dir / "golden_logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids).logits
    return float((golden[..., :VOCABULARY] - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize(("architecture", "layout", "shape"), [
    ("llama", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {**LLAMA, "num_processes": 4}),
    ("gpt2", {"tensor_parallel_size": 2, "no_pipeline_parallel": True},
     {"num_processes": 4, "precision": "bf16", "zero_stage": 1}),
])  # fmt: skip
def test_the_engine_begins_with_the_folders_weights_and_goes_on(
    launch: Any, corpus: Path, tmp_path: Path, architecture: str, layout: dict[str, Any], shape: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "hf", architecture)
    import_model(
        ImportSettings(
            input_model_dir=tmp_path / "hf",
            output_checkpoint_dir=tmp_path / "initial",
            input_tokenizer_file=corpus / "tok.model",
            make_vocab_size_divisible_by=64,
            **layout,
        )
    )
    words = flags(
        corpus,
        tmp_path / "out",
        job_name="begun",
        initial_checkpoint_dir=tmp_path / "initial",
        **STILL,
        **layout,
        **shape,
    )
    done = launch("step2_pretrain_model/pretrain.sh", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "begins with the weights in" in done.stdout
    checkpoints = tmp_path / "out" / "checkpoint" / "begun"
    tolerance = LOGITS_TOLERANCE["bfloat16" if "precision" in shape else "float32"]
    assert distance(model, checkpoints / "global_step1") < tolerance
    metrics = tmp_path / "out" / "metrics" / "begun.jsonl"
    losses = [json.loads(line).get("loss") for line in metrics.read_text().splitlines()]

    shutil.rmtree(checkpoints / "global_step2")  # as if the run had ended at step 1: it goes on from its own checkpoint
    (tmp_path / "out" / "manifest" / "begun.json").unlink()
    done = launch("step2_pretrain_model/pretrain.sh", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "goes on from step 1" in done.stdout
    assert [json.loads(line).get("loss") for line in metrics.read_text().splitlines()] == losses
