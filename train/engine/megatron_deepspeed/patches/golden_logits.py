"""The training engine's own logits for a fixed input, saved with every checkpoint: what an export has to reproduce.

They are computed first: where they are not finite the weights are not either, and no checkpoint is written. The loss
alone would not tell, as it belongs to the weights from before the last update.

File `golden_logits.safetensors` in `global_stepN`: `input_ids` int64 [1, n], `logits` float32 [1, n, padded vocabulary]
and, as metadata, `engine`, `engine_commit` and `dtype`, the type they were computed in.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from train.checkpoint_folders import GOLDEN_LOGITS
from train.engine.megatron_deepspeed import linear
from train.engine.megatron_deepspeed.patches import Patch, Run
from train.engine.non_finite import non_finite

_POSITIONS = 32  # 32 positions of a 128,000-token vocabulary are 16 MB
_SEED = 20240415


def input_ids(vocab_size: int, end_of_document: int, batch_size: int, length: int) -> Any:
    """Token ids [batch_size, length], the same on every rank and every time, without an end of document.

    An end of document inside would, under --reset-attention-mask, hide what stands before it.
    """
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (batch_size, length), generator=generator)
    return torch.where(ids == end_of_document, (ids + 1) % vocab_size, ids)


def compute(engine: Any, checkpoint_dir: Path) -> dict[str, Any] | None:
    """The live model's `input_ids` and `logits`, on the one rank that writes them; None elsewhere. All ranks call it.

    Raises:
        NonFiniteLossError: on every rank, when any of them has a logit that is NaN or infinite.
    """
    import torch
    from megatron import get_args, get_tokenizer
    from megatron.core import mpu

    args, tokenizer = get_args(), get_tokenizer()
    # one token more than the model sees: upstream cuts the labels from the same sequence
    tokens = input_ids(_real_vocab_size(tokenizer), tokenizer.eod, args.micro_batch_size, args.seq_length + 1)
    positions = min(_POSITIONS, args.seq_length)
    was_training = engine.module.training
    with torch.no_grad(), linear.exact():  # an export has the weights, not the way in which they were trained
        part = _pipeline_logits(engine, tokens) if _is_pipeline(engine) else _plain_logits(engine, tokens)
    engine.module.train(was_training)
    if _any_non_finite(part):
        raise non_finite(checkpoint_dir, engine.global_steps, "the weights")
    if part is None:  # not the last pipeline stage
        return None
    part = part[:positions, 0].float().contiguous()
    logits = _gathered(part, mpu.get_tensor_model_parallel_group())
    if mpu.get_data_parallel_rank() or mpu.get_tensor_model_parallel_rank():
        return None
    return {"input_ids": tokens[:1, :positions].contiguous(), "logits": logits[None].cpu().contiguous()}


def write(tensors: dict[str, Any], folder: Path, engine_commit: str) -> None:
    """Writes what `compute` returned into a checkpoint's folder."""
    from megatron import get_args
    from safetensors.torch import save_file

    computed_in = str(get_args().params_dtype).removeprefix("torch.")
    metadata = {"engine": "megatron-deepspeed", "engine_commit": engine_commit, "dtype": computed_in}
    save_file(tensors, str(folder / GOLDEN_LOGITS), metadata=metadata)


def _any_non_finite(part: Any) -> bool:
    """Whether some rank's part of the logits (None: it has none) is not finite; the same answer on all ranks."""
    import torch
    from deepspeed.accelerator import get_accelerator

    # every position, not only the recorded ones
    bad = part is not None and not bool(torch.isfinite(part).all())
    box = get_accelerator().IntTensor([int(bad)])
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    return bool(box.item())


def _real_vocab_size(tokenizer: Any) -> int:
    """The tokenizer's size without the pieces that upstream adds to it, which no export has."""
    sentencepiece: Any = getattr(tokenizer, "tokenizer", None)
    return len(sentencepiece) if hasattr(sentencepiece, "__len__") else int(tokenizer.vocab_size)


def _is_pipeline(engine: Any) -> bool:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    return isinstance(engine, PipelineEngine)


def _pipeline_logits(engine: Any, tokens: Any) -> Any:
    """This tensor rank's part of the logits, [sequence, batch, vocabulary part]; None before the last stage."""
    _, logits = engine.eval_batch(
        iter([{"text": tokens}]), return_logits=True, bcast_loss=False, reduce_output=None, num_micro_batches=1
    )
    return logits


def _plain_logits(engine: Any, tokens: Any) -> Any:
    """The same from an engine without pipeline module, whose output is [batch, sequence, vocabulary part]."""
    from deepspeed.accelerator import get_accelerator
    from megatron import get_args, get_tokenizer
    from megatron.utils import get_ltor_masks_and_position_ids

    tokens = tokens[:, :-1].to(get_accelerator().current_device_name())
    engine.module.eval()
    mask, _, positions = get_ltor_masks_and_position_ids(
        tokens, get_tokenizer().eod, False, False, False, get_args().use_flash_attn
    )
    output = engine.module(tokens, positions, mask)
    return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)


def _gathered(part: Any, group: Any) -> Any:
    import torch

    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group=group))]
    torch.distributed.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=-1)


def _apply(run: Run) -> str:
    from deepspeed import DeepSpeedEngine

    save_checkpoint = DeepSpeedEngine.save_checkpoint

    @functools.wraps(save_checkpoint)
    def save_with_logits(self: Any, save_dir: str, tag: str | None = None, *others: Any, **options: Any) -> Any:
        tag = tag or f"global_step{self.global_steps}"
        tensors = compute(self, Path(save_dir))
        saved = save_checkpoint(self, save_dir, tag, *others, **options)
        if tensors is not None:
            write(tensors, Path(save_dir) / tag, run.engine_commit)
        return saved

    DeepSpeedEngine.save_checkpoint = save_with_logits
    return f"DeepSpeedEngine.save_checkpoint: writes {GOLDEN_LOGITS} too, refuses weights that are not finite"


PATCH = Patch(
    name="golden-logits",
    reason="nothing in a checkpoint says how its weights are laid out or that they are finite; its logits do",
    affected="all upstream versions",
    apply=_apply,
)
