"""Writes a hostfile ('HOST slots=PROCESSES' a line) of the nodes of this job: Slurm, Grid Engine, PBS, or a list.

Slots are --slots, or the GPUs that the scheduler counts, or those that the nodes show when asked (--ask_nodes).
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.cluster.create_files import HostfileSettings, create_hostfile

EXAMPLE = "scripts/common/create_hostfile.sh --output hostfile --ask_nodes"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(HostfileSettings, create_hostfile, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
