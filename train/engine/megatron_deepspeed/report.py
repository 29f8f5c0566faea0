"""What of Megatron-DeepSpeed is native here, what is replaced, and what that costs: the installer's smoke import.

Run with the checkout on PYTHONPATH: `python -m train.engine.megatron_deepspeed.report`. It applies the patches,
imports all that a pretraining run imports, and prints a table with one line per patch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from train.engine.megatron_deepspeed import extensions, patches

# By patch: what its replacement costs or saves where that was measured (benchmarks/RESULTS.md says on what).
_COSTS = {
    "deepspeed-compression": "nothing: never called",
    "torchvision": "nothing: never called",
    "apex": "nothing: H200, compiled norms 0.27 ms, apex's 0.47",
    "dataset-helpers": "nothing: compiled before",
    "environment-report": "nothing",
    "cpu-layer-norm": "nothing: the same kernel",
    "contiguous-attention": "copies of query, key and value",
    "cpu-kernels": "saves 43 % of a step (demo)",
    "flash-attention": "H200, causal: 459 TFLOP/s by cuDNN, 270 by flash",
    "compiled-fusions": "nothing beside compiled-layers",
    "compiled-layers": "H200: 601 TFLOP/s, 549 without",
    "fused-cross-entropy": "H200: 601 TFLOP/s, 584 without",
    "batch-broadcast": "H200: 606 TFLOP/s, 603 without",
    "gradient-accumulation": "H200: 601 TFLOP/s, 598 without",
    "last-outputs": "H200: saves 3.7 GiB",
    "gradient-reduction": "nothing on one GPU",
    "early-reduction": "two H200s: 10 ms of 1,990 left",
    "travelling-products": "two H200s, TP2: 536 TFLOP/s, 477 before",
    "shared-memory-op": "nothing: never called",
    "universal-notes": "nothing",
    "golden-logits": "one more forward pass a save",
    "whole-checkpoints": "checksums, and a copy in memory a save",
}
_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One line of the table: a component, what became of it, what that costs, and what stands for it."""

    component: str
    state: str
    cost: str = ""
    replacement: str = ""


def patch_rows(outcomes: Sequence[patches.Outcome]) -> list[Row]:
    """What the patches replaced here, in their own words."""
    words = {"applied": "replaced", "not needed": "as it is"}
    return [
        Row(
            outcome.patch.name,
            words.get(outcome.state, outcome.state),
            _COSTS.get(outcome.patch.name, _NOT_MEASURED) if outcome.state == "applied" else "",
            outcome.detail,
        )
        for outcome in outcomes
    ]


def extension_row(extension: extensions.Extension, device: str) -> Row:
    """Whether a package of CUDA kernels is installed, and what its absence means on `device`."""
    version, lacks = extensions.state(extension)
    name = f"package {extension.name}"
    if version is not None:
        return Row(name, f"native {version}", "", "" if device == "cuda" else "used on CUDA only")
    return Row(name, "not there", "see the patches", f"{lacks}; {extension.option} compiles it, for CUDA")


def table(rows: Sequence[Row]) -> str:
    """The rows with headings, in columns."""
    cells = [("component", "state", "what that costs", "replaced by")]
    cells += [(row.component, row.state, row.cost, row.replacement) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def main() -> int:
    import torch

    if not torch.cuda.is_available():  # DeepSpeed else looks for other devices
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    outcomes = patches.apply_all(patches.Run(), patches.disabled_names(os.environ))
    import deepspeed
    import megatron.model
    import megatron.training
    from deepspeed.accelerator import get_accelerator
    from megatron.data import helpers

    device = get_accelerator().device_name()
    print(f"Megatron-DeepSpeed imports from {os.path.dirname(os.path.dirname(megatron.model.__path__[0]))}")  # noqa: PTH120
    print(f"on {device}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, helpers {helpers.__file__}\n")
    rows = [extension_row(extension, device) for extension in (extensions.APEX, extensions.FLASH_ATTN)]
    print(table(rows + patch_rows(outcomes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
