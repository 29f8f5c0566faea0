"""The files that scripts/common makes from a job's nodes: an ssh configuration, and a hostfile."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train import outputs
from train.cluster import allocation, ask_nodes, hostfile, schedulers, ssh, this_machine
from train.cluster.nodes import Nodes, equal_count
from train.cluster.settings import SOURCES, ClusterSettings
from train.errors import UserError
from train.settings import setting

_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(ClusterSettings)}


@dataclass(frozen=True)
class SshConfigSettings:
    """What create_ssh_config_file takes."""

    output: Path = setting(Path("ssh_config"), help="file to write; nothing in ~/.ssh is ever written")
    nodes_from: str = setting("auto", help=_HELP["nodes_from"], choices=("auto", *SOURCES))
    hostfile: Path | None = setting(None, help=_HELP["hostfile"])
    num_nodes: int = setting(0, help=_HELP["num_nodes"])
    ssh_port: int = setting(ssh.DEFAULT_PORT, help=_HELP["ssh_port"])
    user: str | None = setting(None, help="login name on the nodes, when it is another one than here")
    identity_file: Path | None = setting(
        None, help="private key to offer first; your ssh settings' keys go on to count"
    )
    overwrite: bool = setting(False, help="replace an existing file", flag_only=True)
    dry_run: bool = setting(False, help="print the file, write nothing", flag_only=True)

    def problems(self) -> Iterator[str]:
        yield from _cluster(self).problems()
        yield from _output_problems(self.output)


@dataclass(frozen=True)
class HostfileSettings:
    """What create_hostfile takes."""

    output: Path = setting(Path("hostfile"), help="file to write")
    nodes_from: str = setting("auto", help=_HELP["nodes_from"], choices=("auto", *SOURCES))
    hostfile: Path | None = setting(None, help="take the nodes from this list of hosts, one a line")
    num_nodes: int = setting(0, help=_HELP["num_nodes"])
    slots: int = setting(0, help="processes on each node; 0 takes the GPUs that the scheduler or this node shows")
    ask_nodes: bool = setting(False, help="ask every node for its GPUs through ssh, and refuse nodes that differ")
    ssh_config: Path | None = setting(None, help=_HELP["ssh_config"])
    ssh_port: int = setting(ssh.DEFAULT_PORT, help=_HELP["ssh_port"])
    overwrite: bool = setting(False, help="replace an existing file", flag_only=True)
    dry_run: bool = setting(False, help="print the file, write nothing", flag_only=True)

    def problems(self) -> Iterator[str]:
        yield from _cluster(self).problems()
        yield from _output_problems(self.output)
        if self.slots < 0:
            yield f"--slots {self.slots}: it must be 0 or more."
        if self.slots and self.ask_nodes:
            yield "--slots and --ask_nodes: leave one of them out."


def create_ssh_config_file(settings: SshConfigSettings) -> int:
    """Writes an ssh configuration for the nodes of this job, and says how to use it.

    Raises:
        UserError: the nodes cannot be told, a name is unfit, or another file is there already.
    """
    nodes = _nodes(settings)
    text = ssh.build_config(
        nodes.hosts,
        known_hosts=settings.output.absolute().with_name(settings.output.name + ".known_hosts"),
        port=settings.ssh_port,
        user=settings.user,
        identity_file=settings.identity_file.expanduser() if settings.identity_file else None,
        included=ssh.included_files(),
    )
    if settings.dry_run:
        print(text, end="")
        return 0
    _write(settings.output, text, overwrite=settings.overwrite)
    path = shlex.quote(str(settings.output.absolute()))
    print(f"nodes: {nodes}")
    print(f"try:   ssh -F {path} {nodes.hosts[-1]} hostname")
    print(f"use:   pretrain.sh or finetune.sh ... --ssh_config {path}")
    return 0


def create_hostfile(settings: HostfileSettings) -> int:
    """Writes a hostfile of the nodes of this job, and says where the slots come from.

    Raises:
        UserError: the nodes or their GPUs cannot be told, nodes differ, or another file is there already.
    """
    nodes = _nodes(settings)
    slots, why = _slots(settings, nodes)
    text = hostfile.build(nodes.hosts, slots)
    if settings.dry_run:
        print(text, end="")
        return 0
    _write(settings.output, text, overwrite=settings.overwrite)
    print(f"nodes: {nodes}")
    print(f"slots: {slots} on each node ({why})")
    print(f"use:   pretrain.sh or finetune.sh ... --hostfile {shlex.quote(str(settings.output.absolute()))}")
    return 0


def _slots(settings: HostfileSettings, nodes: Nodes) -> tuple[int, str]:
    """Slots of each node, and where the number comes from."""
    if settings.slots:
        return settings.slots, "--slots"
    this_host = nodes.hosts[0] if nodes.source == "none" else None
    if settings.ask_nodes:
        this_host = this_host or this_machine.name_among(nodes.hosts, own_name=nodes.own_name)
        counts = _asked(settings, nodes, this_host)
        found, why = equal_count(counts, "the GPUs that nvidia-smi shows"), "nvidia-smi, asked on every node"
    elif nodes.gpus or nodes.slots:
        return nodes.gpus or nodes.slots or 0, nodes.origin
    else:
        this_host = this_host or this_machine.name_among(nodes.hosts, own_name=nodes.own_name)
        found = allocation.count_gpus(os.environ) if this_host else 0
        why = f"nvidia-smi on {this_host}; --ask_nodes asks the others too"
    if found == 0:
        where = "the nodes show" if settings.ask_nodes else f"{this_host} shows" if this_host else "it is not told here"
        told = f"{where} no GPU" if this_host or settings.ask_nodes else f"{where} how many GPUs the nodes have"
        raise UserError(f"{nodes}: {told}: give --slots PROCESSES{'' if settings.ask_nodes else ', or --ask_nodes'}.")
    return found, why


def _asked(settings: HostfileSettings, nodes: Nodes, this_host: str | None) -> dict[str, int]:
    if settings.ssh_config is not None:
        if not settings.ssh_config.is_file():
            raise UserError(f"--ssh_config {settings.ssh_config} is not a file: create_ssh_config_file.sh makes one.")
        return ask_nodes.gpus(nodes.hosts, config=settings.ssh_config.absolute(), this_host=this_host)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "ssh_config"
        known_hosts = Path(folder) / "known_hosts"
        included = ssh.included_files()
        text = ssh.build_config(nodes.hosts, known_hosts=known_hosts, port=settings.ssh_port, included=included)
        config.write_text(text, encoding="utf-8")
        return ask_nodes.gpus(nodes.hosts, config=config, this_host=this_host)


def _nodes(settings: SshConfigSettings | HostfileSettings) -> Nodes:
    """The nodes of the job. This machine alone needs no such file, so that one counts only when asked for."""
    nodes = schedulers.find_nodes(_cluster(settings), os.environ)
    if nodes.source == "none" and settings.nodes_from != "none":
        raise UserError(
            f"nobody names the nodes ({'; '.join(nodes.absent)}): start inside the job, or name them with --hostfile."
        )
    return nodes


def _cluster(settings: SshConfigSettings | HostfileSettings) -> ClusterSettings:
    return ClusterSettings(
        nodes_from=settings.nodes_from,
        hostfile=settings.hostfile,
        num_nodes=settings.num_nodes,
        ssh_port=settings.ssh_port,
    )


def _output_problems(output: Path) -> Iterator[str]:
    users = Path("~/.ssh").expanduser().resolve()
    if users in (output.resolve(), *output.resolve().parents):
        yield f"--output {output} lies in your ~/.ssh, which is left alone: choose another file; ssh -F FILE uses it."


def _write(output: Path, text: str, *, overwrite: bool) -> None:
    """Writes the file unless the very same is there already: a job's script may call this before each step."""
    if not overwrite and output.is_file() and output.read_text(encoding="utf-8", errors="replace") == text:
        print(f"{output} is there already, for the same nodes")
        return
    with outputs.new_file(output, overwrite=overwrite) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    print(f"wrote {output}")
