"""TRL's SFTTrainer, with an eye on each batch and a proof of what is saved.

Examples come tokenized, with labels (`train.finetune.examples`), so TRL neither renders nor masks anything again:
what was shown to the user is what is trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from trl import SFTConfig

from train import outputs
from train.errors import NonFiniteLossError, UserError, VerificationError
from train.finetune import adapter, padding_mask, special_ids
from train.finetune.folder import FinetuneFolder
from train.finetune.held_out import HeldOutTrainer
from train.finetune.masks import IGNORED

_GOLDEN_TOKENS = 64


class FinetuneTrainer(HeldOutTrainer):
    """See the module."""

    def __init__(self, *, folder: FinetuneFolder, **arguments: Any) -> None:
        self._folder = folder
        super().__init__(**arguments)
        model, own = plain_model(self), cast(SFTConfig, self.args)
        padding_mask.leave_out(model.get_base_model() if isinstance(model, PeftModel) else model, is_packed=own.packing)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro batch; stops the run when it trains nothing, or when its loss is no number.

        Here, since TRL has just waited for the GPU to count tokens: anywhere else in a step it would have to wait anew.
        """
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        step = self.state.global_step + 1
        if not bool((inputs["labels"][..., 1:] != IGNORED).any()):
            raise UserError(f"step {step}: a batch has no token to train; this should have been seen before. Stopped.")
        if not bool(torch.isfinite(loss.detach())):
            raise self._non_finite(step, float(loss))
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Leaves out the second name of a tied weight: under ZeRO-2 it comes as a copy, and would be saved as one."""
        if state_dict is not None:
            model = plain_model(self)
            once = {name for name, _ in model.named_parameters()}
            twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        super()._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint with NaN in it would be taken for a good one."""
        for parameter in model.parameters():
            own_part = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 a rank holds a part
            if not bool(torch.isfinite(own_part).all()):
                raise self._non_finite(self.state.global_step, float("nan"))
        super()._save_checkpoint(model, trial)

    def _non_finite(self, step: int, loss: float) -> NonFiniteLossError:
        good = self._folder.checkpoint()
        last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good}"
        return NonFiniteLossError(
            f"step {step:,}: loss or weights are {loss}; {last}. Lower --learning_rate, raise --warmup_ratio, or use"
            " --bf16 instead of --fp16; --resume never starts again."
        )


def write_golden_logits(trainer: FinetuneTrainer, to: Path) -> None:
    """Keeps the live model's logits on the beginning of the first example, by which the saved folder is proven.

    All ranks take part: under ZeRO-3 none has the whole model.
    """
    from safetensors.torch import save_file

    examples: Any = trainer.train_dataset
    input_ids = torch.tensor([examples[0]["input_ids"][:_GOLDEN_TOKENS]])
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else plain_model(trainer)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids.to(trainer.args.device), use_cache=False).logits
    if trainer.is_world_process_zero():
        dtype = str(next(plain_model(trainer).parameters()).dtype)
        tensors = {"input_ids": input_ids, "logits": logits.float().cpu().contiguous()}
        save_file(tensors, to, metadata={"dtype": dtype})


def save(trainer: FinetuneTrainer, folder: FinetuneFolder, special: Mapping[str, int | None]) -> None:
    """Saves weights and configuration, of a LoRA the adapter alone, and holds what is on disk against the live weights.

    Raises:
        VerificationError: a tensor is missing in what was saved, differs by a bit, or is empty.
    """
    model = plain_model(trainer)
    special_ids.agree(model, dict(special))
    if isinstance(model, PeftModel):
        live = {name: weight.cpu().clone() for name, weight in _whole_parameters(model) if ".lora_" in name}
        if trainer.is_world_process_zero():
            adapter.save(model, live, folder.model_dir)
        named = iter([(adapter.saved_name(name), weight) for name, weight in live.items()])
    else:
        trainer.save_model(str(folder.model_dir))
        named = _whole_parameters(model)
    if trainer.is_world_process_zero():
        ours = ("config.json", "generation_config.json", adapter.CONFIG)
        for file in folder.model_dir.iterdir():
            if file.name not in ours and ".safetensors" not in file.name:
                file.unlink()  # the tokenizer, saved anew: the original files are copied instead
    report = _compare(trainer, folder.model_dir, named)
    if trainer.is_world_process_zero():
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        best = {"step": trainer.state.best_global_step, "eval_loss": trainer.state.best_metric}
        told = {"weights": report, "trained": trained, "steps": trainer.state.global_step}
        told["best"] = best if trainer.args.load_best_model_at_end else None
        outputs.write_text(folder.saved, json.dumps(told) + "\n")


def _compare(trainer: FinetuneTrainer, model_dir: Path, named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    stored = _stored_tensors(model_dir) if trainer.is_world_process_zero() else {}
    count, largest, wrong = 0, 0.0, []
    for name, live in named:
        if not trainer.is_world_process_zero():
            continue
        count += 1
        if name not in stored:
            wrong.append(f"{name} was not saved.")
            continue
        saved = stored[name]()
        if saved.shape != live.shape:
            wrong.append(f"{name} was saved as {list(saved.shape)}, it is {list(live.shape)}.")
        elif not torch.equal(saved, live.cpu()):
            largest = max(largest, float((saved.double() - live.cpu().double()).abs().max()))
            wrong.append(f"{name} was saved differently from what was trained.")
    if wrong:
        raise VerificationError(wrong)
    return {"tensors": count, "max_abs_difference": largest}


def _stored_tensors(model_dir: Path) -> dict[str, Any]:
    """For each tensor on disk, a function that reads it."""
    from safetensors import safe_open

    readers: dict[str, Any] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        stored: Any = safe_open(file, framework="pt")
        for name in stored.keys():  # noqa: SIM118  safe_open is no mapping
            readers[name] = lambda stored=stored, name=name: stored.get_tensor(name)
    return readers


def _whole_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Each parameter, gathered when ZeRO-3 has spread it; tied ones once."""
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            yield name, parameter.detach()


def _gathered(parameter: Any) -> contextlib.AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def plain_model(trainer: FinetuneTrainer) -> Any:
    """The model without wrappers, and without the automatic precision that training adds to its forward pass."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
