"""The way back: a Hugging Face folder becomes a checkpoint of Megatron-DeepSpeed, from which pretraining goes on.

Called by scripts/step2_pretrain_model/convert_huggingface_model_to_megatron_deepspeed.py. Written are weights at step
0, in any tensor and pipeline layout; the optimizer begins anew. What was written is read again and must be the folder's
tensors to the last bit. One layer is in memory at a time; without the pipeline module, whose form is one file per
tensor rank, the whole model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import checkpoint_files, manifest, outputs
from train import settings as settings_module
from train.checkpoint.megatron import layout, qkv_layout, stages, vocabulary
from train.checkpoint.megatron.huggingface_source import HuggingFaceSource, open_source
from train.checkpoint.megatron.merge import PER_HEAD, PER_RANK
from train.checkpoint_folders import GOLDEN_LOGITS, MEGATRON_POINTER, POINTER
from train.errors import UserError, VerificationError
from train.settings import setting

STEP = "import_huggingface"
_STEP_DIR = "global_step0"
_ORDERS = {"per_head": PER_HEAD, "per_rank": PER_RANK}
_GOLDEN_TOKENS = 32
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class ImportSettings:
    """The settings of `convert_huggingface_model_to_megatron_deepspeed.py`."""

    input_model_dir: Path = setting(help="Hugging Face folder of a GPT-2, Llama or Mistral, with safetensors")
    output_checkpoint_dir: Path = setting(help="folder to write: global_step0, and the files that point at it")
    tensor_parallel_size: int = setting(1, help="tensor ranks of the run that will begin from it")
    pipeline_parallel_size: int = setting(1, help="its pipeline stages")
    no_pipeline_parallel: bool = setting(False, help="write the form that --no_pipeline_parallel reads")
    input_tokenizer_file: Path | None = setting(
        None, help="SentencePiece model of the run; the folder's tokenizer.model when not given and there"
    )
    make_vocab_size_divisible_by: int = setting(
        vocabulary.DIVISOR, help="pad the vocabulary to a multiple of this times the tensor ranks"
    )
    query_key_value_order: str = setting(
        "per_head", help="row order of the fused projection; per_rank for upstream from 676a482c on",
        choices=tuple(_ORDERS),
    )  # fmt: skip
    overwrite: bool = setting(False, help="replace an existing output", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done and exit", flag_only=True)

    def problems(self) -> Iterator[str]:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "make_vocab_size_divisible_by"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        if self.no_pipeline_parallel and self.pipeline_parallel_size > 1:
            yield (
                f"--no_pipeline_parallel contradicts --pipeline_parallel_size {self.pipeline_parallel_size}: leave one"
                " of them out."
            )


def import_model(settings: ImportSettings) -> int:
    """Writes the checkpoint, reads it again, and only then lets it appear.

    Raises:
        UserError: the folder is missing or damaged, its model cannot be computed by Megatron-DeepSpeed or cut into
            this layout, or the output exists.
        VerificationError: what was written is not what was read.
    """
    output_dir, folder = settings.output_checkpoint_dir, settings.input_model_dir
    tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
    if settings.dry_run:
        form = "no-pipeline form" if settings.no_pipeline_parallel else "pipeline form"
        print(f"would write {folder} as {output_dir / _STEP_DIR}: TP {tensor} x PP {pipeline}, {form}")
        return 0
    started = time.time()
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"--input_model_dir {folder} has no {_CONFIG}: name the folder of a Hugging Face model. One on the Hub is"
            " brought into a folder by `hf download NAME --local-dir FOLDER`."
        )
    inputs = (folder / _CONFIG, *sorted(folder.glob("*.safetensors")))
    plain = settings_module.to_plain(settings)
    if manifest.is_done(output_dir, step=STEP, settings=plain, inputs=inputs):
        print(f"{output_dir} is there already, from the same settings and inputs: nothing to do.")
        return 0
    outputs.refuse_inputs(output_dir, (folder,))
    source = open_source(folder)
    arguments = build_arguments(source, settings)
    with outputs.new_folder(output_dir, overwrite=settings.overwrite) as unfinished:
        step_dir = unfinished / _STEP_DIR
        step_dir.mkdir()
        write(source, arguments, step_dir)
        _write_golden_logits(source, step_dir)
        tensors = _prove(source, step_dir)
        checkpoint_files.record(step_dir)
        (unfinished / POINTER).write_text(_STEP_DIR, encoding="utf-8")
        (unfinished / MEGATRON_POINTER).write_text("0", encoding="utf-8")
        results = {
            "checkpoint": _STEP_DIR,
            "model_type": source.config.model_type,
            "vocab_size": source.vocab_size,
            "padded_vocab_size": arguments.padded_vocab_size,
            "tensors_equal_when_read_again": tensors,
        }
        manifest.write(
            unfinished / manifest.FILE_NAME, step=STEP, settings=plain, inputs=inputs, results=results, started=started
        )
    added = arguments.padded_vocab_size - source.vocab_size
    print(f"proven: {tensors} tensors, read again, are those of {folder} to the last bit")
    print(f"wrote {output_dir / _STEP_DIR}: TP {tensor} x PP {pipeline}, {added} rows of padding in the vocabulary")
    return 0


def build_arguments(source: HuggingFaceSource, settings: ImportSettings) -> argparse.Namespace:
    """The arguments that a run of this model in this layout would have saved.

    Raises:
        UserError: heads, widths or layers do not divide.
    """
    import torch

    model, ranks = source.arguments, settings.tensor_parallel_size
    problems = [
        f"{name} {getattr(model, name)} / --tensor_parallel_size {ranks} ="
        f" {getattr(model, name) / ranks:g}: each tensor rank needs a whole share; choose another."
        for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size")
        if getattr(model, name) % ranks
    ]
    problems += stages.problems((), layers=model.num_layers, stages=settings.pipeline_parallel_size)
    order = _ORDERS[settings.query_key_value_order]
    if order == PER_RANK and model.num_key_value_heads != model.num_attention_heads:
        problems.append("--query_key_value_order per_rank: those commits of upstream cannot train grouped queries.")
    if problems:
        raise UserError(problems)
    dtype = source.read(source.names[0]).dtype
    tokenizer = settings.input_tokenizer_file or source.stored.folder / _TOKENIZER
    needed = vocabulary.engine_vocab_size(tokenizer) if tokenizer.is_file() else 0
    if settings.input_tokenizer_file is not None and not tokenizer.is_file():
        raise UserError(f"--input_tokenizer_file {tokenizer} is not a file: name the run's SentencePiece model.")
    return argparse.Namespace(
        **vars(model),
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=settings.pipeline_parallel_size,
        no_pipeline_parallel=settings.no_pipeline_parallel,
        make_vocab_size_divisible_by=settings.make_vocab_size_divisible_by,
        padded_vocab_size=vocabulary.padded(
            max(source.vocab_size, needed), divisor=settings.make_vocab_size_divisible_by, ranks=ranks
        ),
        seq_length=model.max_position_embeddings,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        consumed_train_tokens=0,
        **{qkv_layout.ORDER: order},
    )


def write(source: HuggingFaceSource, arguments: argparse.Namespace, step_dir: Path) -> None:
    """Writes the weights and the records of all model ranks into an existing, empty folder."""
    import torch

    ranks = arguments.tensor_model_parallel_size
    whole: list[dict[tuple[str, int], Any]] = [{} for _ in range(ranks)]
    for kind, index in source.layer_keys():
        order = getattr(arguments, qkv_layout.ORDER)
        slices = source.layer(kind, index, ranks=ranks, order=order, rows=arguments.padded_vocab_size)
        number = layout.layer_number(kind, index, arguments.num_layers)
        for rank, held in enumerate(slices):
            if arguments.no_pipeline_parallel:
                whole[rank][kind, index] = held
            else:
                torch.save(held, step_dir / f"layer_{number:02}-model_{rank:02}-model_states.pt")
    for rank in range(ranks * arguments.pipeline_model_parallel_size):
        module = layout.nested(whole[rank]) if arguments.no_pipeline_parallel else None
        torch.save(_state(arguments, module), step_dir / f"mp_rank_{rank:02}_model_states.pt")


def _state(arguments: argparse.Namespace, module: Any) -> dict[str, Any]:
    """What DeepSpeed and upstream look for in a model rank's file when they load weights only."""
    return {
        "module": module,
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": arguments.tensor_model_parallel_size * arguments.pipeline_model_parallel_size,
        "ds_config": {"zero_optimization": {"stage": 0}},
        "checkpoint_version": 3.0,
        "iteration": 0,
        "tokens": 0,
        "args": arguments,
    }


def _write_golden_logits(source: HuggingFaceSource, step_dir: Path) -> None:
    """The folder's own logits, which whatever is exported from the checkpoint has to reproduce."""
    import torch
    from safetensors.torch import save_file

    from train.checkpoint.streamed_model import compute_logits

    length = min(_GOLDEN_TOKENS, source.arguments.max_position_embeddings)
    input_ids = torch.randint(source.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    logits = compute_logits(source.config, input_ids, source.names, source.read)
    metadata = {"engine": "transformers", "dtype": "float32"}
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, step_dir / GOLDEN_LOGITS, metadata=metadata)


def _prove(source: HuggingFaceSource, step_dir: Path) -> int:
    """Reads the checkpoint as an export does, and compares; returns how many tensors there are."""
    from train.checkpoint.megatron.export import weights

    different, count = [], 0
    for name, tensor in weights(step_dir, vocab_size=source.vocab_size):
        count += 1
        if not tensor.equal(source.read(name)):
            different.append(name)
    if different or count != len(source.names):
        raise VerificationError(
            f"{len(different)} of {len(source.names)} tensors are not what was read ({', '.join(different[:1])});"
            f" {count} were found: nothing was written. Please report this."
        )
    return count
