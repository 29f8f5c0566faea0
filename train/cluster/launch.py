"""Runs one command as ranks on all nodes of an allocation, and says how it ended.

    plan = launch.plan(command, allocation, recipe.cluster, launch_dir=..., job=...)
    end = launch.run(plan, log=...)
    outcome.check(run_folder.outcome, end.exit_status, log=log, cause=end.text)

`plan` builds everything and touches nothing (--dry_run prints it); `run` writes it into the launch folder and starts.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from train import outputs, process
from train.cluster import launchers, measure, network, node_script, secrets, slow_nodes, this_machine
from train.cluster.allocation import Allocation
from train.cluster.coordinator import Coordinator, Job
from train.cluster.settings import ClusterSettings
from train.early_end import END_BY_VARIABLE
from train.errors import EXIT_OK, EXIT_USER
from train.process import Command


@dataclass(frozen=True)
class Plan:
    """A launch, ready to start.

    Attributes:
        job: what runs on each node.
        transport: what starts the nodes.
        launch_dir: the run's folder for what this launch needs.
        files: what is written there first.
        reason: why this launcher.
        rank: the command of each rank, for people to read.
        measurement: what runs before it and must find no slow node (`--preflight measure`).
    """

    job: Job
    transport: Command
    launch_dir: Path
    files: dict[Path, str]
    reason: str
    rank: Command
    measurement: Plan | None = None

    def text(self) -> str:
        """What would run, for --dry_run."""
        shown = "".join(f"# {file}\n{text.rstrip()}\n\n" for file, text in self.files.items())
        nodes = "here" if self.job.is_local else f"on each of {', '.join(self.job.nodes)}"
        ranks = f"{self.job.processes} x {nodes}" if self.job.is_distributed else "once, here"
        first = f"{self.measurement.text()}\n\n" if self.measurement is not None else ""
        return f"{first}{shown}# {self.reason}\n{self.transport.text()}\n\n# in the end, {ranks}:\n{self.rank.text()}"


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        exit_status: 0, a rank's own, or 128 + N when signal N ended it.
        text: the cause, with node and rank, where the ranks themselves could not report one.
    """

    exit_status: int
    text: str


def plan(
    command: Command,
    allocation: Allocation,
    cluster: ClusterSettings,
    *,
    launch_dir: Path,
    job_name: str,
    paths: Iterable[Path] = (),
    engine_dir: Path | None = None,
    is_distributed: bool = True,
    began: float | None = None,
) -> Plan:
    """Builds a launch.

    Args:
        command: what every rank runs, and the files it reads.
        allocation: where.
        cluster: how.
        launch_dir: a folder of the run's own that all nodes share.
        job_name: tells this run from others on the same nodes.
        paths: what every node must see, besides the launch folder.
        engine_dir: a checkout whose commit must be the same on all nodes.
        is_distributed: False starts one plain process that knows of no ranks.
        began: seconds since 1970 from which --time_budget_min counts; now when None. What a launcher does first
            (tokenizing, reshaping a checkpoint) may take longer than --save_margin_min.

    Raises:
        UserError: the launcher's program is missing, or the secrets file cannot be used.
    """
    is_here = len(allocation.hosts) == 1 and this_machine.name_among(allocation.hosts) is not None
    launcher, why = launchers.choose(cluster.launcher, allocation, is_here=is_here)
    is_local = launcher == "local"
    script = launch_dir / "node.sh"
    working_dir = command.working_dir or (Path.cwd() if is_local else launch_dir)
    files = {
        script: node_script.build(
            python=sys.executable,
            launch_dir=launch_dir,
            working_dir=working_dir,
            environment=node_script.carried(os.environ),
            modules=cluster.modules,
            node_setup=cluster.node_setup and cluster.node_setup.absolute(),
            max_open_files=cluster.max_open_files,
        )
    }
    ssh_config = None
    if launcher in ("pdsh", "ssh", "openmpi"):
        ssh_config = launch_dir / "ssh_config"
        files[ssh_config] = _ssh_config(allocation, cluster, launch_dir)
    shared_network = _network(allocation, cluster) if launcher == "openmpi" else None
    transport = launchers.build(launcher, allocation, script=script, ssh_config=ssh_config, network=shared_network)
    job = Job(
        name=f"{allocation.job_id or ''} {job_name}",
        nodes=allocation.hosts,
        processes=allocation.processes_per_host,
        device=allocation.device,
        argv=command.argv,
        environment={**command.environment, **_end_by(cluster, began)},
        working_dir=working_dir,
        secrets=secrets.collect(os.environ, cluster.secrets_file),
        starter=cluster.starter,
        is_distributed=is_distributed,
        interface=cluster.network_interface,
        engine_dir=engine_dir,
        paths=tuple(paths) if not is_local else (),
        refuses_differences=cluster.preflight != "warn",
        is_local=is_local,
        is_scheduled=allocation.job_id is not None,
        join_timeout_s=cluster.join_timeout_s,
        node_timeout_s=cluster.node_timeout_s,
        grace_s=cluster.grace_s,
    )
    first = None
    if cluster.preflight == "measure":
        first = plan_measurement(
            allocation,
            cluster,
            launch_dir=launch_dir / "measure",
            job_name=job_name,
            paths=job.paths,
            engine_dir=engine_dir,
        )
    return Plan(job, transport, launch_dir, files, f"launcher: {launcher} ({why})", command, first)


def plan_measurement(
    allocation: Allocation,
    cluster: ClusterSettings,
    *,
    launch_dir: Path,
    job_name: str,
    paths: Iterable[Path] = (),
    engine_dir: Path | None = None,
) -> Plan:
    """Builds the launch of `train.cluster.measure` on all nodes; the arguments are those of `plan`."""
    how = "warn" if cluster.preflight == "warn" else "check"
    return plan(
        measure.build_command(allocation, launch_dir.absolute() / measure.FIGURES),
        allocation,
        dataclasses.replace(cluster, preflight=how, starter="own", time_budget_min=0),
        launch_dir=launch_dir,
        job_name=f"{job_name} measure",
        paths=paths,
        engine_dir=engine_dir,
    )


def run(plan: Plan, *, log: Path) -> End:
    """Starts a launch, copies what it prints to the terminal and to `log`, and waits for its end.

    With a measurement before it, nodes that are found slow end it with exit status 2.
    """
    if plan.measurement is not None:
        end, report = run_measurement(plan.measurement, log=log)
        if report is not None and report.problems:
            end = End(EXIT_USER, "\n".join((*report.problems, "--preflight check starts without measuring.")))
        if end.exit_status != EXIT_OK:
            return end
    for file, text in {**plan.rank.files, **plan.files}.items():
        outputs.write_text(file, text)
    with Coordinator(plan.job, plan.launch_dir) as coordinator:
        status = process.run(plan.transport, log=log, watcher=coordinator)
        failure = coordinator.result(status)
    if failure is None:
        return End(EXIT_OK, "")
    return End(failure.exit_status, failure.text)


def run_measurement(plan: Plan, *, log: Path) -> tuple[End, slow_nodes.Report | None]:
    """Measures, and prints a table of all nodes.

    Returns:
        How it ended, and what it found when it ended well.

    Raises:
        UserError: the nodes' figures cannot be read.
    """
    print("measuring matrix products and all-reduce on every node", flush=True)
    end = run(plan, log=log)
    if end.exit_status != EXIT_OK:
        return end, None
    figures = measure.read(plan.launch_dir / measure.FIGURES)
    report = slow_nodes.compare(figures, nodes=plan.job.nodes, device=plan.job.device)
    print(report.table, flush=True)
    if report.all_reduce_over_all_gb_per_s is not None:
        print(f"all-reduce over all nodes: {report.all_reduce_over_all_gb_per_s:.3g} GB/s", flush=True)
    return end, report


def _end_by(cluster: ClusterSettings, began: float | None) -> dict[str, str]:
    """The time at which the ranks save and end, for `train.early_end`."""
    if not cluster.time_budget_min:
        return {}
    return {END_BY_VARIABLE: str((time.time() if began is None else began) + 60 * cluster.time_budget_min)}


def _ssh_config(allocation: Allocation, cluster: ClusterSettings, launch_dir: Path) -> str:
    from train.cluster import ssh

    if cluster.ssh_config is not None:
        return f'Include "{cluster.ssh_config.absolute()}"\n'
    return ssh.build_config(
        allocation.hosts,
        known_hosts=launch_dir / "known_hosts",
        port=cluster.ssh_port,
        included=ssh.included_files(),
    )


def _network(allocation: Allocation, cluster: ClusterSettings) -> str | None:
    """The network that leads from here to the other nodes, as OpenMPI is told it; interfaces differ in name."""
    peer = next((host for host in allocation.hosts if this_machine.name_among([host]) is None), None)
    address = network.source_address(peer) if peer is not None else None
    if cluster.network_interface is not None:
        address = network.interface_address(cluster.network_interface) or address
    return network.network_of(address) if address is not None else None
