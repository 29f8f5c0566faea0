"""A LoRA adapter's folder: saved from the live model, whole or not at all, and proven by loading it anew.

    save(model, gathered_tensors, folder)                                        # in the first training rank
    checks = prove(base_dir, folder, golden_logits_file)                         # in the launcher

The folder is PEFT's: adapter_config.json, which names the base, and adapter_model.safetensors; beside them tokenizer,
chat template and generation_config.json. Without a config.json, `AutoModelForCausalLM.from_pretrained` loads base and
adapter: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.verify import LOGITS_MEASURE, compare_logits, logits_problems, read_golden_logits
from train.errors import UserError, VerificationError, first_line

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# bitsandbytes computes by other kernels in training than here: 0.003 to 0.036 were seen. 8 bits round the activations,
# too, each time otherwise: 0.112 in a random model of a billion weights. There the folder's own logits tell how much.
_PACKED_TOLERANCE = 0.1


def save(model: Any, tensors: Mapping[str, Tensor], to: Path) -> None:
    """Writes the adapter of a live model.

    Args:
        model: PEFT's model.
        tensors: the trained parameters by their live names, gathered: under ZeRO-3 the model's own are empty.
        to: the folder to write.

    Raises:
        VerificationError: a tensor is empty.
    """
    refuse_empty(tensors)
    model.save_pretrained(to, state_dict=dict(tensors))
    (to / "README.md").unlink(missing_ok=True)  # PEFT's card, all blanks: step 5 writes one
    config = json.loads((to / CONFIG).read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # PEFT has a set: each run would order it otherwise
    (to / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(to)


def refuse_empty(tensors: Mapping[str, Tensor]) -> None:
    """Raises VerificationError for tensors without numbers, as an adapter saved from one part of ZeRO-3 has them."""
    empty = sorted(name for name, tensor in tensors.items() if tensor.numel() == 0)
    if empty or not tensors:
        raise VerificationError(
            [f"the adapter's {name} is empty: it was not gathered." for name in empty] or ["the adapter has no tensor."]
        )


def saved_name(live: str) -> str:
    """What PEFT calls a live parameter in its file: without the adapter's own name."""
    return live.replace(".default.", ".")


def attach(base: Any, adapter_dir: Path) -> Any:
    """Puts an adapter on its base model. Each of its tensors must find its place: PEFT only warns.

    Raises:
        UserError: it cannot be loaded on this base.
        VerificationError: its tensors are missing, left over, empty or of another shape; one problem for each.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(adapter_dir / WEIGHTS)
        refuse_empty(stored)
        with warnings.catch_warnings(action="ignore"):  # what is missing is raised below
            model = PeftModel.from_pretrained(base, str(adapter_dir))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{adapter_dir} cannot be loaded on its base model: {first_line(error)}") from None
    live = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    wrong = [f"the adapter lacks {name}." for name in sorted(live.keys() - stored.keys())]
    wrong += [f"the adapter has {name}, for which the base has no place." for name in sorted(stored.keys() - live)]
    wrong += [
        f"the adapter's {name} is {tuple(stored[name].shape)}, the base has {tuple(shape)}."
        for name, shape in sorted(live.items())
        if name in stored and stored[name].shape != shape
    ]
    if wrong:
        raise VerificationError(wrong)
    return model


def load(base_dir: Path, adapter_dir: Path, *, dtype: str, quantization: Any = None) -> Any:
    """Base and adapter from their files, ready to compute in `dtype` (a name torch knows, or "auto").

    Args:
        base_dir: the base model's folder.
        adapter_dir: the adapter's.
        dtype: what is not packed is loaded in it.
        quantization: how bitsandbytes packs the base (`lora.quantization`), on the CPU; None leaves it as it is.

    Raises:
        UserError: they cannot be loaded, or do not fit each other.
        VerificationError: tensors of the adapter are missing, left over, empty, of another shape or not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        packed = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype, local_files_only=True, **packed)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{base_dir} cannot be loaded: {first_line(error)}") from None
    model = attach(base, adapter_dir)
    bad = sorted(
        saved_name(name)
        for name, weight in model.named_parameters()
        if ".lora_" in name and not weight.isfinite().all()
    )
    if bad:
        raise VerificationError([f"the adapter's {name} holds NaN or infinity." for name in bad])
    return model.eval()


def prove(base_dir: Path, adapter_dir: Path, golden_logits: Path, *, quantization: Any = None) -> dict[str, Any]:
    """Loads base and adapter anew, the base packed as in training, and holds their logits against the live model's.

    Returns:
        `weights`, `logits`, `tokenizer` and `config` as `train.checkpoint.verify.verify` has them.

    Raises:
        VerificationError: what was saved is not what was trained.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    record = _logits_record(base_dir, adapter_dir, golden_logits, quantization)  # which says what cannot be loaded
    stored = load_file(adapter_dir / WEIGHTS)
    up = [weight for name, weight in stored.items() if ".lora_B." in name]
    config = json.loads((adapter_dir / CONFIG).read_text(encoding="utf-8"))
    problems = list(logits_problems(record, "the logits of base and adapter"))
    if not record["finite"]:
        problems.append("the logits of base and adapter hold NaN or infinity.")
    if problems:
        raise VerificationError(problems)
    return {
        "weights": {
            "parameters": sum(tensor.numel() for tensor in stored.values()),
            "dtype": str(next(iter(stored.values())).dtype).removeprefix("torch."),
            "adapted_modules": len(up),
            "adapted_and_changed": sum(bool(weight.any()) for weight in up),  # they begin as zeros
        },
        "logits": record,
        "tokenizer": {"vocab_size": len(AutoTokenizer.from_pretrained(adapter_dir, local_files_only=True))},
        "config": {"base_model": config["base_model_name_or_path"], "rank": config["r"], "alpha": config["lora_alpha"]},
    }


def _logits_record(base_dir: Path, adapter_dir: Path, golden_logits: Path, quantization: Any) -> dict[str, Any]:
    """How far the logits of base and adapter are from the golden ones, and how far they may be."""
    import torch

    input_ids, golden, computed_in = read_golden_logits(golden_logits)

    def logits_of(model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=input_ids, use_cache=False).logits.float()
        return logits

    dtype = computed_in or "float32"
    record: dict[str, Any] = {
        "compared_with": f"{golden_logits.name} of the training process",
        "measure": LOGITS_MEASURE,
        "tokens": input_ids.numel(),
        "golden_dtype": dtype,
    }
    if quantization is None:
        model = load(base_dir, adapter_dir, dtype="float32")
        return record | compare_logits(golden, dtype, lambda name: logits_of(model.to(getattr(torch, name))))

    def logits_in(name: str) -> Tensor:  # packed weights cannot be cast: what is between them is loaded in that type
        return logits_of(load(base_dir, adapter_dir, dtype=name, quantization=quantization))

    rounds_activations = bool(getattr(quantization, "load_in_8bit", False))
    found = compare_logits(
        golden, "bfloat16" if rounds_activations else "float32", logits_in, at_least=_PACKED_TOLERANCE
    )
    if "rounding" in found:
        found["tolerance_is"] = "twice what the folder's own logits change by between float32 and bfloat16"
    return record | {"tolerance_is": "for a packed base, whose kernels are not the same"} | found
