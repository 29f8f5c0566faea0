"""How fast a checkpoint of Megatron-DeepSpeed becomes a Hugging Face folder, and with how much memory.

    python benchmarks/conversion_throughput.py --work_dir /tmp/conversion --family llama

Makes a model of 1.3 billion parameters with random weights in bfloat16, imports it as a checkpoint of TP2 x PP2, then
measures, each in a process of its own: the export; its proof (every tensor and the logits); and, for comparison, one
plain reading and writing of the same bytes on the same disk. The files are in the page cache, as after training.
Needs 11 GB of disk, which it frees again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 16 * 1024 * 1024
_VOCABULARY = 32_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where export and copy write; in --work_dir when not given, /dev/shm/NAME is memory",
    )
    parser.add_argument("--family", choices=("gpt2", "llama"), default="llama")
    parser.add_argument("--num_layers", type=int, default=24, help="fewer for a trial")
    parser.add_argument("--shard_bytes", type=int, default=5_000_000_000, help="largest shard of the export")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many is printed")
    parser.add_argument("--part", choices=tuple(_PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.output_dir = given.output_dir or given.work_dir / "output"
    if given.part:
        print(json.dumps(_measured(lambda: _PARTS[given.part](given))))
        return 0
    given.work_dir.mkdir(parents=True)
    given.output_dir.mkdir(parents=True)
    try:
        for part in ("make", "import"):
            print(f"{part}: {_best(part, 1)}", flush=True)
        size = _checkpoint_bytes(given.work_dir)
        for part, repeats in (("copy", given.repeats), ("export", given.repeats), ("prove", 1)):
            found = _best(part, repeats)
            shards = [file.stat().st_size for file in (given.output_dir / "exported").glob("*.safetensors")]
            line = f"{part}: {size / found['seconds'] / 1e9:.2f} GB/s ({size / 1e9:.2f} GB in {found['seconds']:.1f} s,"
            line += f" {found['cpu_seconds']:.1f} s of CPU)"
            if shards:
                line += f", peak memory {found['peak_gb']:.2f} GB = {found['peak_gb'] * 1e9 / max(shards):.2f} x"
                line += f" the largest of {len(shards)} shards, {found['before_gb']:.2f} GB of it before"
            print(line, flush=True)
    finally:
        shutil.rmtree(given.work_dir)
        shutil.rmtree(given.output_dir, ignore_errors=True)
    return 0


def _best(part: str, repeats: int) -> dict[str, float]:
    runs = []
    for _ in range(repeats):
        os.sync()  # what the last part wrote is not this part's work
        done = subprocess.run(
            [sys.executable, *sys.argv, "--part", part], check=True, stdout=subprocess.PIPE, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return min(runs, key=lambda run: run["seconds"])


def _measured(work: Callable[[], Any]) -> dict[str, float]:
    import torch  # noqa: F401 - the time is the work's, not that of loading libraries
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig  # noqa: F401

    from train.checkpoint.megatron import export  # noqa: F401

    before = _peak_gb()
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gb": _peak_gb(),
        "before_gb": before,
    }


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _config(given: argparse.Namespace) -> Any:
    from transformers import GPT2Config, LlamaConfig

    shared = {"vocab_size": _VOCABULARY, "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}
    if given.family == "gpt2":
        shape = {"n_embd": 2048, "n_head": 16, "n_layer": given.num_layers, "n_positions": 2048}
        return GPT2Config(architectures=["GPT2LMHeadModel"], **shape, **shared)
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=given.num_layers,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **shape,
        **shared,
    )


def _make(given: argparse.Namespace) -> None:
    """A Hugging Face folder with random weights, and a tokenizer of as many made-up words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from train.checkpoint.shard_writer import spec_of, write_shards

    config = _config(given)
    folder = given.work_dir / "model"
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = [spec_of(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    print(f"{sum(spec.numbers for spec in specs):,} parameters")
    generator = torch.Generator().manual_seed(1)

    def random(name: str) -> torch.Tensor:
        values = torch.randn(shapes[name], generator=generator) * 0.02
        return (values + (1.0 if len(shapes[name]) == 1 else 0.0)).to(torch.bfloat16)

    write_shards(folder, specs, random)
    config.save_pretrained(folder)
    words = WordLevel({f"word{number}": number for number in range(_VOCABULARY)}, unk_token="word0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), model_max_length=2048).save_pretrained(folder)


def _import(given: argparse.Namespace) -> None:
    from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model

    import_model(
        ImportSettings(
            input_model_dir=given.work_dir / "model",
            output_checkpoint_dir=given.work_dir / "megatron",
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
        )
    )


def _step_dir(work_dir: Path) -> Path:
    return work_dir / "megatron" / "global_step0"


def _copy(given: argparse.Namespace) -> None:
    """Reads every file of the checkpoint and writes its bytes into one other, with two system calls a chunk."""
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    target = given.output_dir / "copy"
    target.unlink(missing_ok=True)
    with target.open("wb", buffering=0) as output:
        for file in sorted(_step_dir(given.work_dir).iterdir()):
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    output.write(view[:count])
    target.unlink()


def _export(given: argparse.Namespace) -> None:
    from train.checkpoint.megatron.export import export

    folder = given.output_dir / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    export(
        _step_dir(given.work_dir), folder, vocab_size=_VOCABULARY, model_max_length=2048, shard_bytes=given.shard_bytes
    )


def _prove(given: argparse.Namespace) -> None:
    from train.checkpoint.megatron.export import weights
    from train.checkpoint.verify import Source, verify

    folder, step_dir = given.output_dir / "exported", _step_dir(given.work_dir)
    for file in (given.work_dir / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    source = Source(
        weights=lambda: weights(step_dir, vocab_size=_VOCABULARY), golden_logits=step_dir / "golden_logits.safetensors"
    )
    verify(folder, source)


def _checkpoint_bytes(work_dir: Path) -> int:
    return sum(file.stat().st_size for file in _step_dir(work_dir).iterdir())


_PARTS = {"make": _make, "import": _import, "copy": _copy, "export": _export, "prove": _prove}

if __name__ == "__main__":
    raise SystemExit(main())
