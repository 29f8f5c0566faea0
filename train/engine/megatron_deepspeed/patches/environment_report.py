"""Upstream prints DeepSpeed's environment report from every rank at every start."""

from __future__ import annotations

from train.engine.megatron_deepspeed.patches import Patch, Run


def _apply(_run: Run) -> str:
    import deepspeed.env_report

    deepspeed.env_report.main = lambda *_args, **_options: None
    return "deepspeed.env_report.main: silent"


PATCH = Patch(
    name="environment-report",
    reason="pretrain_gpt.py starts a compiler test per rank to print a report; the run's manifest holds the versions",
    affected="all upstream versions",
    apply=_apply,
)
