"""Writes a report of a pretraining or finetuning run: one HTML file, to be opened anywhere.

Loss, held-out loss, learning rate, gradient norm, tokens per second and GPU memory as curves and numbers; settings,
checkpoints, samples, evaluations. Needs no account and no network, and works while the run runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.monitor.report import ReportSettings, report


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        ReportSettings,
        report,
        argv,
        description=__doc__,
        example="scripts/common/report.sh output/step2_pretrain_model --output report.html",
    )


if __name__ == "__main__":
    raise SystemExit(main())
