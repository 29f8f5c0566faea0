"""The tiny run of the real engine that tests share, and the way to make the stored checkpoints anew.

    python tests/engine/megatron_tiny_run.py tests/checkpoint/megatron_tp2_pp2
    python tests/engine/megatron_tiny_run.py tests/checkpoint/megatron_tp2_dp2_zero1_bf16
    python tests/engine/megatron_tiny_run.py tests/checkpoint/megatron_llama_tp2

runs Megatron-DeepSpeed in that layout on this machine's CPU and copies its last checkpoint there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VOCABULARY = 120
_PROJECT_ROOT = Path(__file__).resolve().parents[2]
_RECIPE = {
    "engine": "megatron-deepspeed",
    "device": "cpu",
    "precision": "fp32",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,  # two per tensor rank: with one, both orders of query, key and value are the same
    "sequence_length": 32,
    "init_method_std": 0.6,  # large, so that a wrong layout or GELU cannot pass
    "train_tokens": 8 * 4 * 32,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "lr": "1e-2",
    "split": "80,10,10",
    "save_interval": 4,
    "eval_interval": 4,
    "eval_iters": 1,
    "log_interval": 1,
}

# The stored checkpoints. The second and third are of a Llama shape, with grouped queries and a head of its own; the
# third has all that a wrong export would show in: two key-value groups in each tensor rank, no rounding, a theta of its
# own.
_STORED: dict[str, dict[str, object]] = {
    "megatron_tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "megatron_tp2_dp2_zero1_bf16": {
        "tensor_parallel_size": 2,
        "zero_stage": 1,
        "precision": "bf16",
        "architecture": "llama",
        "num_key_value_heads": 2,
        "ffn_hidden_size": 32,
    },
    "megatron_llama_tp2": {
        "tensor_parallel_size": 2,
        "architecture": "llama",
        "hidden_size": 32,  # heads of width 2 would turn by one angle, whatever theta is
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 24,
        "rope_theta": 50,
        "norm_epsilon": 1e-4,
        "megatron_arguments": "--make-vocab-size-divisible-by 64",
    },
}


def write_corpus(folder: Path) -> Path:
    """A small tokenizer `tok.model` and `sums_text_document.bin/.idx` that it reads; returns `folder`."""
    import sentencepiece

    from train.data.indexed_dataset import IndexedDatasetWriter

    lines = [f"{a} plus {b} is {a + b}" for a in range(40) for b in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tok"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=["<s>", "</s>", "<pad>", "<CLS>", "<SEP>", "<EOD>", "<MASK>"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok.model"))
    end = processor.piece_to_id("<EOD>")
    files = (folder / f"sums_text_document.{suffix}" for suffix in ("bin", "idx"))
    with IndexedDatasetWriter(*files, np.dtype(np.uint16)) as writer:
        for line in lines:
            writer.add_document(np.array([*processor.encode(line), end], dtype=np.uint16))
    return folder


def flags(corpus: Path, output: Path, **more: object) -> list[str]:
    """The arguments of pretrain.sh; `more` wins over the tiny recipe."""
    given = _RECIPE | {
        "input_tokenizer_file": corpus / "tok.model",
        "data_path": corpus / "sums_text_document",
        "output_model_dir": output,
    }
    return [word for name, value in (given | more).items() for word in (f"--{name}", str(value))]


def main(target: Path) -> None:
    """Makes a stored checkpoint. It runs in a folder of its own, whose path the checkpoint will hold."""
    with tempfile.TemporaryDirectory(prefix="megatron_tiny_run_", dir="/tmp") as name:
        folder = Path(name)
        words = flags(write_corpus(folder), folder / "out", job_name="tiny", num_processes=4, **_STORED[target.name])
        script = _PROJECT_ROOT / "scripts" / "step2_pretrain_model" / "pretrain.py"
        subprocess.run([sys.executable, script, *words], check=True)
        shutil.copytree(folder / "out" / "checkpoint" / "tiny" / "global_step8", target / "global_step8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
