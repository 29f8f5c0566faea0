"""Runs steps 1 to 5 in a row from one YAML with a section of flags for each step, here or as a chain of jobs.

All sections are checked before anything starts. A step starts only if the one before it succeeded; a finished one skips
itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.all_steps import RunAllSettings, run_all


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        RunAllSettings, run_all, argv, description=__doc__, example="run_all.sh --recipe my_steps.yaml --submit slurm"
    )


if __name__ == "__main__":
    raise SystemExit(main())
