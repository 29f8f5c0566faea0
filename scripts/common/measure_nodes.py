"""Times a matrix product and all-reduce on every node of this job, and names the nodes that are slower than the others.

The same as --preflight measure of steps 2 and 4, without a training. Exit code 0: none is slow; 2: the slow ones are
named.
"""

from __future__ import annotations

from collections.abc import Sequence

from train import cli
from train.cluster.measure_nodes import MeasureSettings, measure_nodes

EXAMPLE = "scripts/common/measure_nodes.sh --hostfile hostfile --output measured_nodes.json"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(MeasureSettings, measure_nodes, argv, description=__doc__, example=EXAMPLE)


if __name__ == "__main__":
    raise SystemExit(main())
