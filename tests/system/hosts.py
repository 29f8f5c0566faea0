"""Hosts on this machine, for tests/system: each with network, host name, processes, /tmp and ssh server of its own.

    with Hosts(tmp_path, {"login": "ens3", "node1": "eno1", "node2": "eth0"}) as hosts:
        hosts.run("login", ["ssh", "-F", str(hosts.ssh_config), "node1", "hostname"])

Each host is a set of Linux namespaces. They are joined by a bridge in a further one, so this machine's own network,
/etc and home folders are left as they are, and two test sessions do not see each other. The disk is shared, as a
cluster's file system is, except /tmp, /run and /dev/shm. Everything ends with the process that made the hosts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import ssh_files  # type: ignore[import-not-found]

NAMESPACE = Path(__file__).with_name("namespace.py")
PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_INTERFACES = {"login": "ens3", "node1": "eno1", "node2": "eth0"}  # host name -> its network interface's
SSH_PORTS = (22, 2222)
DAEMONS = {"sshd", "munged", "slurmctld", "slurmd", "sge_qmaster", "sge_execd"}  # what a healed host may still run
_SWITCH = "switch"
_TMP_SIZE = "2g"  # a limit, not what it takes


class NotPossibleError(Exception):
    """This machine cannot make hosts; the message says why."""


@dataclass(frozen=True)
class Process:
    """A process on a host. `pid` is its id on this machine, outside of the host's namespace."""

    pid: int
    name: str
    argv: tuple[str, ...]


@dataclass
class Host:
    """One host. `pid` is its first process as seen from this machine."""

    name: str
    address: str
    interface: str
    holder: subprocess.Popen[str]
    pid: int
    small_disks: list[str] = field(default_factory=list)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this host, with the caller's environment, folder, input and output."""
        return [sys.executable, "-S", "-E", str(NAMESPACE), "enter", str(self.pid), *argv]


class Hosts:
    """Several hosts on one network, each with an ssh server that lets root in by key.

    Attributes:
        folder: the shared folder of this test session, the same path on every host.
        home: root's home folder on every host, under `folder`.
        ssh_config: an OpenSSH configuration that reaches all hosts without a question, for `ssh -F`.
    """

    def __init__(self, folder: Path, interfaces: Mapping[str, str] | None = None, keep: Sequence[Path] = ()) -> None:
        """`keep`: folders under this machine's /tmp that the hosts, whose /tmp is their own, see nevertheless."""
        self.folder = folder.resolve()
        self.home = self.folder / "home"
        self.ssh_config = self.folder / "ssh_config"
        self.interfaces = dict(interfaces or DEFAULT_INTERFACES)
        self._keep = [
            str(Path(kept).resolve()) for kept in (self.folder, PROJECT_ROOT, sys.prefix, sys.base_prefix, *keep)
        ]
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> Hosts:
        if not self._hosts:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def start(self) -> None:
        """Makes the hosts; entering the context does so too.

        Raises:
            NotPossibleError: this machine cannot have them.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> list[str]:
        """All hosts, in the order they were asked for."""
        return list(self.interfaces)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What root finds after logging in, and `extra`: nothing of this process's environment."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        login = {"HOME": str(self.home), "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8"}
        return {**login, "PATH": path, **(extra or {})}

    def popen(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Starts `argv` on a host; stdout and stderr together are its `stdout`. Signals sent to it reach `argv`."""
        return subprocess.Popen(
            self[name].command(argv), env=self.environment(env), cwd=cwd or self.folder, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Runs `argv` on a host and returns exit status, stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: after `timeout_s`; `argv` is killed.
            AssertionError: with `check`, when it failed; the message has all its output.
        """
        done = subprocess.run(
            self[name].command(argv), env=self.environment(env), cwd=cwd or self.folder, text=True, errors="replace",
            stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, start_new_session=True,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{name}: {argv} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def cut(self, name: str) -> None:
        """The host's network cable is pulled: it runs on, and nobody hears of it any more."""
        self._on_network(_SWITCH, f"link set {_port(name)} down")

    def join(self, name: str) -> None:
        """Puts the cable back."""
        self._on_network(_SWITCH, f"link set {_port(name)} up")

    def refuse_ssh(self, name: str) -> None:
        """The host's ssh server stops listening; sessions that are open stay open."""
        self.run(name, ["pkill", "--pidfile", "/run/sshd.pid"], check=True)
        wait_until(lambda: not self._listens(name), f"sshd of {name} to end")

    def accept_ssh(self, name: str) -> None:
        """Starts the host's ssh server."""
        config = ssh_files.server_config(self.folder, name)
        self.run(name, ["/usr/sbin/sshd", "-f", str(config), "-E", str(config.with_suffix(".log"))], check=True)
        wait_until(lambda: self._listens(name), f"sshd of {name} to listen; see {config.with_suffix('.log')}")

    def small_disk(self, name: str, path: str | Path, size: str = "1m") -> None:
        """On this host alone, an empty disk of `size` (mount's -o size=) takes the place of the folder `path`."""
        self[name].small_disks.append(str(path))
        self._lay_disk(name, str(path), size)

    def lay_over(self, source: Path, target: str) -> None:
        """On every host, `source` takes the place of `target`, which must exist on this machine."""
        for name in self.names:
            self.run(name, ["mount", "--bind", str(source), target], check=True)

    def processes(self, name: str) -> list[Process]:
        """Everything that runs on a host, except its first process."""
        return [process for process in _processes(f"/proc/{self[name].pid}/ns/pid") if process.pid != self[name].pid]

    def strays(self, name: str) -> list[Process]:
        """What runs on a host and is none of a cluster's daemons: what a run left behind, when none is going on.

        An ssh session and a scheduler's job show by what they run.
        """
        return [process for process in self.processes(name) if process.name not in DAEMONS]

    def mend(self) -> None:
        """Undoes what a test did to the hosts: cables, ssh servers and disks are as they were."""
        for name in self.names:
            self.join(name)
            while self[name].small_disks:
                self.run(name, ["umount", "--recursive", "--lazy", self[name].small_disks.pop()], check=True)
            if not self._listens(name):
                self.accept_ssh(name)

    def end_strays(self) -> None:
        """Kills what a test left running, see `strays`."""
        for process in (process for name in self.names for process in self.strays(name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends every host and all that runs on it."""
        for host in self._hosts.values():
            assert host.holder.stdin is not None
            host.holder.stdin.close()
        for host in self._hosts.values():
            host.holder.wait(timeout=30)
        self._hosts.clear()

    def _start(self) -> None:
        if os.geteuid() != 0:
            raise NotPossibleError("only root can make network namespaces")
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.interfaces, 11)}
        ssh_files.write(self.folder, self.home, self.ssh_config, addresses, SSH_PORTS)
        holders = {name: self._hold(name) for name in (_SWITCH, *self.interfaces)}
        for name, holder in holders.items():
            assert holder.stdout is not None
            pid = holder.stdout.readline().strip()
            if not pid:
                told = (self.folder / name / "namespace.log").read_text().strip()
                raise (NotPossibleError if told.startswith("unshare:") else RuntimeError)(f"no namespaces: {told}")
            interface = self.interfaces.get(name, "")
            self._hosts[name] = Host(name, addresses.get(name, ""), interface, holder, int(pid))
        try:
            self._on_network(_SWITCH, "link add lan type bridge", "link set lan up")
        except subprocess.CalledProcessError as error:
            raise NotPossibleError(f"no network bridge: {error.stderr.strip()}") from None
        for name, interface in self.interfaces.items():
            self._wire(self[name], interface)
            self.run(
                name, [sys.executable, "-S", str(NAMESPACE), "small_disk", "/tmp", _TMP_SIZE, *self._keep], check=True
            )
            self.accept_ssh(name)

    def _hold(self, name: str) -> subprocess.Popen[str]:
        (self.folder / name / "etc").mkdir(parents=True, exist_ok=True)
        with (self.folder / name / "namespace.log").open("w") as log:
            return subprocess.Popen(
                ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                 sys.executable, "-S", str(NAMESPACE), "init", name, str(self.folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def _lay_disk(self, name: str, path: str, size: str) -> None:
        argv = [sys.executable, "-S", str(NAMESPACE), "small_disk", path, size, *self._keep]
        self.run(name, argv, check=True)

    def _wire(self, host: Host, interface: str) -> None:
        port = _port(host.name)
        self._on_network(
            _SWITCH,
            f"link add {port} type veth peer name {interface} netns {host.pid}",
            f"link set {port} master lan up",
        )
        # docker0: what Docker leaves on every host, with the same address; a program that takes the first interface it
        # finds, or all of them, talks to itself there.
        self._on_network(
            host.name,
            "link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up",
            f"addr add {host.address}/24 dev {interface}", f"link set {interface} up",
        )  # fmt: skip

    def _on_network(self, name: str, *commands: str) -> None:
        for command in commands:  # nsenter and not `command()`: ip names a namespace by a process id of this side
            network = f"--net=/proc/{self[name].pid}/ns/net"
            subprocess.run(["nsenter", network, "ip", *command.split()], check=True, capture_output=True, text=True)

    def _listens(self, name: str) -> bool:
        listening = self.run(name, ["ss", "-H", "-l", "-t", "-n", f"sport = {SSH_PORTS[0]}"]).stdout
        return bool(listening.strip())


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Returns when `condition` holds.

    Raises:
        TimeoutError: naming `what` was waited for.
    """
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.05)


def _port(name: str) -> str:
    return f"port-{name}"


def _processes(namespace: str) -> Iterator[Process]:
    wanted = Path(namespace).readlink()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (folder / "ns" / "pid").readlink() == wanted and (argv := (folder / "cmdline").read_text().split("\0")):
                yield Process(int(folder.name), (folder / "comm").read_text().strip(), tuple(argv[:-1]))
