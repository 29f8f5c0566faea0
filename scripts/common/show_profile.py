"""Shows where the time of a recorded step went on each rank: products, attention, communication, nothing.

pretrain.sh and finetune.sh record one with --profile_step. Exit code 0: shown; 2: there is no such recording.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.monitor.profile_table import ProfileSettings, show


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        ProfileSettings,
        show,
        argv,
        description=__doc__,
        example="scripts/common/show_profile.sh output/step2_pretrain_model",
    )


if __name__ == "__main__":
    raise SystemExit(main())
