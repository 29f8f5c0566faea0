"""Says how a pretraining or finetuning run is: job, step, loss, speed, time left, last checkpoint, how it ended.

Reads the run's folder, and asks the scheduler that it was handed to where there is one. Exit code 0: answered; 2: the
folder holds no run.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.status import StatusSettings, status


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        StatusSettings,
        status,
        argv,
        description=__doc__,
        example="scripts/common/status.sh output/step2_pretrain_model",
    )


if __name__ == "__main__":
    raise SystemExit(main())
