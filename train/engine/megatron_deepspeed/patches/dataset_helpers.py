"""Upstream runs `make` in its own tree at every start, with whatever Python `python3-config` belongs to."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    from megatron.data import dataset_utils

    def use_the_installed_helpers() -> None:
        # fails here, in the first second, rather than when the first batch is built
        from megatron.data import helpers  # noqa: F401

    dataset_utils.compile_helper = use_the_installed_helpers
    return "megatron.data.dataset_utils.compile_helper: the helpers that the installer built"


PATCH = Patch(
    name="dataset-helpers",
    reason="compile_helper() runs make with another Python's python3-config, and fails on a read-only checkout",
    affected="all upstream versions",
    apply=_apply,
)
