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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import ssh_files  # type: ignore[import-not-found]
from host import DAEMONS, NAMESPACE, Host, Process, wait_until  # type: ignore[import-not-found]

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_INTERFACES = {"login": "ens3", "node1": "eno1", "node2": "eth0"}  # host name -> its network interface's
SSH_PORTS = (22, 2222)
_SWITCH = "switch"
_TMP_SIZE = "2g"  # a limit, not what it takes
# What Docker leaves on every host, with the same address: a program that takes the first interface it finds, or all
# of them, talks to itself there.
_DOCKER = ("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")


class NotPossibleError(Exception):
    """This machine cannot make hosts; the message says why."""


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

    def start(self) -> None:
        """Makes the hosts; entering the context does so too.

        Raises:
            NotPossibleError: this machine cannot have them.
        """
        if os.geteuid() != 0:
            raise NotPossibleError("only root can make network namespaces")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @property
    def names(self) -> list[str]:
        """All hosts, in the order they were asked for."""
        return list(self.interfaces)

    def popen(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Starts `argv` on a host; stdout and stderr together are its `stdout`. Signals sent to it reach `argv`."""
        return self[name].popen(argv, env, cwd or self.folder)

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
        """Runs `argv` on a host and returns exit status, stdout and stderr. `env` is added to a login's variables.

        Raises:
            subprocess.TimeoutExpired: after `timeout_s`; `argv` is killed.
            AssertionError: with `check`, when it failed; the message has all its output.
        """
        done = self[name].run(argv, env, cwd or self.folder, timeout_s)
        if check and done.returncode != 0:
            raise AssertionError(f"{name}: {argv} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def cut(self, name: str) -> None:
        """The host's network cable is pulled: it runs on, and nobody hears of it any more."""
        self[_SWITCH].ip(f"link set port-{name} down")

    def join(self, name: str) -> None:
        """Puts the cable back."""
        self[_SWITCH].ip(f"link set port-{name} up")

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
        return self[name].processes()

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
            self._hosts[name] = Host(name, addresses.get(name, ""), interface, self.home, holder, int(pid))
        switch = self[_SWITCH]
        try:
            switch.ip("link add lan type bridge", "link set lan up")
        except subprocess.CalledProcessError as error:
            raise NotPossibleError(f"no network bridge: {error.stderr.strip()}") from None
        for name, interface in self.interfaces.items():
            switch.ip(f"link add port-{name} type veth peer name {interface} netns {self[name].pid}")
            switch.ip(f"link set port-{name} master lan up")
            self[name].ip(f"addr add {addresses[name]}/24 dev {interface}", f"link set {interface} up", *_DOCKER)
            self._lay_disk(name, "/tmp", _TMP_SIZE)
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

    def _listens(self, name: str) -> bool:
        listening = self.run(name, ["ss", "-H", "-l", "-t", "-n", f"sport = {SSH_PORTS[0]}"]).stdout
        return bool(listening.strip())
