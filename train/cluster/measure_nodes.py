"""`--preflight measure` without a training: a table of all nodes, and the same as JSON.

measure_nodes(settings.parse(MeasureSettings, argv, ...))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train import outputs
from train.cluster import allocation as allocations
from train.cluster import launch, slow_nodes
from train.cluster.settings import ClusterSettings
from train.errors import EXIT_OK, EXIT_USER, UserError
from train.settings import section, setting

_INTERRUPTED = (130, 143)  # 128 + SIGINT, 128 + SIGTERM


@dataclass(frozen=True)
class MeasureSettings:
    """What measure_nodes takes: the nodes as for a run, and where the figures go."""

    output: Path = setting(
        Path("measured_nodes.json"), help="JSON file to write, on a disk that all nodes share; while it measures, a"
        " folder beside it holds what the nodes start by",
    )  # fmt: skip
    num_processes: int = setting(0, help="processes on each node; 0 takes the hostfile's, or one per GPU, or one")
    device: str = setting("auto", help="cuda, cpu, or cuda when there is a GPU", choices=("auto", "cuda", "cpu"))
    overwrite: bool = setting(False, help="replace an existing file", flag_only=True)
    dry_run: bool = setting(False, help="print what would run, write nothing", flag_only=True)
    cluster: ClusterSettings = section(ClusterSettings)

    def problems(self) -> Iterator[str]:
        if self.num_processes < 0:
            yield f"--num_processes {self.num_processes}: it must be 0 or more."


def measure_nodes(wanted: MeasureSettings) -> int:
    """Measures all nodes; the exit code is 2 when one is slow, unless --preflight warn.

    Raises:
        UserError: the nodes cannot be told or reached, a rank failed, or the output is there already.
        KeyboardInterrupt: it was asked to end.
    """
    where = allocations.find(wanted.cluster, num_processes=wanted.num_processes, device=wanted.device)
    print(f"where: {where.reason}", flush=True)
    output = wanted.output.absolute()
    if wanted.dry_run:
        folder = output.with_name(f"{output.name}.launch")
        plan = launch.plan_measurement(where, wanted.cluster, launch_dir=folder, job_name=output.name)
        print(f"\n{plan.text()}")
        return EXIT_OK
    with outputs.new_file(output, overwrite=wanted.overwrite) as unfinished, outputs.scratch_folder(output) as folder:
        plan = launch.plan_measurement(
            where, wanted.cluster, launch_dir=folder / "launch", job_name=output.name, paths=[folder]
        )
        end, report = launch.run_measurement(plan, log=folder / "measure.log")
        if end.exit_status in _INTERRUPTED:
            raise KeyboardInterrupt
        if report is None:
            raise UserError(end.text, exit_code=end.exit_status)
        record = slow_nodes.as_plain(report, where.device)
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {wanted.output}")
    if not report.problems:
        return EXIT_OK
    if wanted.cluster.preflight != "warn":
        raise UserError(report.problems, exit_code=EXIT_USER)
    for problem in report.problems:
        print(f"warning: {problem}")
    return EXIT_OK
