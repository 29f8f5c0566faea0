"""Checks one checkpoint, or all of a job, of either engine: reads every byte and says what is damaged.

And whether each can be resumed, reshaped to another layout, exported. Exit code 0: whole; 3: damaged; 2: no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.checkpoint.check import CheckSettings, check

EXAMPLE = "scripts/common/check_checkpoint.sh --input_model_dir output/step2_pretrain_model/checkpoint/JOB"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(CheckSettings, check, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
