"""What a wrong export would have cost: the logits of a converted model with one mistake made on purpose.

    mistakes(folder, golden_file, qkv_layout=PER_HEAD, tensor_parallel_size=2)
    # {"query, key, value in the other order": 1.1, "the other GELU": 2.1e-3}

export_parity.py puts them beside the differences of the right exports: only weights that show a mistake prove anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint import verify
from train.checkpoint.megatron.merge import PER_HEAD, PER_RANK

if TYPE_CHECKING:
    from torch import Tensor

QKV = "query, key, value in the other order"
ACTIVATION = "the other GELU, or gate and up swapped"


def mistakes(folder: Path, golden_file: Path, *, qkv_layout: str, tensor_parallel_size: int) -> dict[str, float]:
    """Largest difference to the golden logits, relative to the largest of them, of each mistake.

    Args:
        folder: a converted GPT-2 or Llama.
        golden_file: what the engine recorded when it saved.
        qkv_layout: the row order that the engine keeps query, key and value in.
        tensor_parallel_size: tensor ranks of the run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    input_ids, golden, _ = verify.read_golden_logits(golden_file)
    right, _ = verify.load(folder)
    right = right.float()
    state = {name: tensor.clone() for name, tensor in right.state_dict().items()}
    heads = right.config.num_attention_heads
    groups = getattr(right.config, "num_key_value_heads", heads)
    head_dim = right.config.hidden_size // heads

    def difference(weights: Mapping[str, Tensor], **config: Any) -> float:
        changed = AutoConfig.from_pretrained(folder, local_files_only=True, **config)
        model = AutoModelForCausalLM.from_config(changed).eval().float()
        model.load_state_dict(weights)
        return relative_difference(model(input_ids).logits, golden)

    read = reading_order(heads, groups, head_dim, tensor_parallel_size)
    other = PER_RANK if qkv_layout == PER_HEAD else PER_HEAD
    found = {QKV: difference(_misread(state, read[qkv_layout], read[other]))}
    if "activation_function" in right.config.to_dict():
        form = "gelu" if right.config.activation_function == "gelu_new" else "gelu_new"
        return found | {ACTIVATION: difference(state, activation_function=form)}
    return found | {ACTIVATION: difference(_swapped(state))}


def relative_difference(logits: Tensor, golden: Tensor) -> float:
    """As train/checkpoint/verify.py measures it: max |difference| / max |golden logits|."""
    golden = golden[..., : logits.shape[-1]].double()
    return float((logits.detach().double() - golden).abs().max() / golden.abs().max())


def reading_order(heads: int, groups: int, head_dim: int, ranks: int) -> dict[str, Tensor]:
    """For both layouts, the rows of [all queries | all keys | all values] in the order of the fused projection."""
    import torch

    queries = torch.arange(heads * head_dim).view(groups, -1)
    keys = queries.numel() + torch.arange(groups * head_dim).view(groups, -1)
    values = keys + keys.numel()
    per_head = torch.cat((queries, keys, values), dim=1).flatten()
    of_ranks = [part.view(ranks, -1) for part in (queries, keys, values)]
    return {PER_HEAD: per_head, PER_RANK: torch.cat(of_ranks, dim=1).flatten()}


def _misread(state: Mapping[str, Tensor], written: Tensor, read: Tensor) -> dict[str, Tensor]:
    import torch

    def reorder(rows: Tensor) -> Tensor:
        wrong = torch.empty_like(rows)
        wrong[read] = rows[written]
        return wrong

    changed = dict(state)
    for name, tensor in state.items():
        if name.endswith("attn.c_attn.weight"):
            changed[name] = reorder(tensor.t()).t()
        elif name.endswith("attn.c_attn.bias"):
            changed[name] = reorder(tensor)
        elif ".q_proj." in name:
            names = [name.replace(".q_proj.", f".{part}_proj.") for part in ("q", "k", "v")]
            parts = [state[one] for one in names]
            changed |= dict(zip(names, reorder(torch.cat(parts)).split([len(part) for part in parts]), strict=True))
    return changed


def _swapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def partner(name: str) -> str:
        return name.replace(".gate_proj.", ".up.").replace(".up_proj.", ".gate_proj.").replace(".up.", ".up_proj.")

    return {name: state[partner(name)] for name in state}
