"""A launch on this machine alone: a launcher, and as many agents as there are nodes, each a process of its own.

    cluster = SmallCluster(tmp_path)
    end = cluster.run("print('hello')", nodes=2)

The transport between them stands in for pdsh and its like: agents are started as another machine would have them, in
sessions of their own and without the launcher's mark, so that nothing but the protocol ends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from train import process

MARK = "TRAIN_TEST_CLUSTER"
PATIENCE_S = 40
_ONE_AT_A_TIME = threading.Lock()
_AGENT = """\
import sys
import train.cluster.agent
from train.cluster import facts
facts._boot = lambda: None  # one machine plays all nodes, which preflight would refuse
sys.stdout.reconfigure(line_buffering=True)
raise SystemExit(train.cluster.agent.main())
"""


@dataclasses.dataclass(frozen=True)
class End:
    """How a launch ended: the launcher's exit status, what it says of it, and what was printed."""

    exit_status: int
    text: str
    printed: str


class SmallCluster:
    """Starts launches in `folder`, and knows all of their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launch_dir = folder / "launch"
        self.log = folder / "run.log"
        self._mark = str(uuid.uuid4())
        self.launcher: subprocess.Popen[str]

    def start(
        self,
        rank: str,
        *,
        nodes: int = 2,
        environment: Mapping[str, str] | None = None,
        agents: Mapping[str, Mapping[str, Any]] | None = None,
        **job: Any,
    ) -> SmallCluster:
        """Starts a launch of the Python program `rank`.

        Args:
            rank: what each rank runs.
            nodes: how many there are: node1, node2, ...
            environment: variables of the launcher.
            agents: the nodes whose agents are started, with variables of each; all by default.
            job: further fields of `train.cluster.coordinator.Job`.
        """
        names = [f"node{number + 1}" for number in range(nodes)]
        spec = {
            "launch_dir": str(self.launch_dir),
            "log": str(self.log),
            "result": str(self.folder / "result.json"),
            "agents": [{"node": name} for name in names]
            if agents is None
            else [{"node": name.partition("#")[0], **more} for name, more in agents.items()],
            "job": {
                "name": self._mark, "nodes": names, "processes": 1, "device": "cpu", "is_local": True,
                "argv": [sys.executable, "-u", "-c", rank], "environment": {}, "join_timeout_s": 20, **job,
            },
        }  # fmt: skip
        (self.folder / "spec.json").write_text(json.dumps(spec))
        self.launcher = subprocess.Popen(
            [sys.executable, __file__, "launcher", str(self.folder / "spec.json")],
            env={**os.environ, MARK: self._mark, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def run(self, rank: str, **how: Any) -> End:
        """Starts a launch and waits for its end."""
        return self.start(rank, **how).end()

    def end(self) -> End:
        """Waits for the launcher's end."""
        printed, _ = self.launcher.communicate(timeout=PATIENCE_S)
        file = self.folder / "result.json"
        assert file.exists(), printed
        return End(**json.loads(file.read_text()), printed=printed)

    def processes(self, *words: str) -> list[psutil.Process]:
        """What runs of this cluster, on whose command line all `words` stand."""
        found = []
        for item in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(item.cmdline())
                if item.status() != psutil.STATUS_ZOMBIE and item.environ().get(MARK) == self._mark:
                    found += [item] if all(word in line for word in words) else []
        return found

    def agent(self, node: str) -> psutil.Process:
        """The agent of a node."""
        (found,) = self.processes("train.cluster.agent", f"--node {node}")
        return found

    def is_quiet(self) -> bool:
        """Whether nothing of it runs."""
        return not self.processes()

    def close(self) -> None:
        """Kills what is left."""
        for item in self.processes():
            with contextlib.suppress(psutil.Error):
                item.kill()
        if hasattr(self, "launcher"):
            self.launcher.wait()
            if self.launcher.stdout is not None:
                self.launcher.stdout.close()


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Returns once `condition` holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def _launcher(spec: dict[str, Any]) -> int:
    """What `train.cluster.launch.run` does, with the transport below."""
    from train.cluster import coordinator as coordinators
    from train.cluster.coordinator import Coordinator, Job

    coordinators._ECHO_GRACE_S, coordinators._TRANSPORT_GRACE_S = 1.0, 1.5  # tests need not wait as long as users do
    launch_dir = Path(spec["launch_dir"])
    paths = {name: tuple(Path(path) for path in spec["job"].pop(name, ())) for name in ("paths",)}
    words = {name: tuple(spec["job"].pop(name)) for name in ("nodes", "argv")}
    job = Job(**spec["job"], **words, **paths, working_dir=launch_dir.parent)
    transport = process.Command((sys.executable, __file__, "transport", sys.argv[2]), hides_secrets=True)
    with Coordinator(job, launch_dir) as coordinator:
        status = process.run(transport, log=Path(spec["log"]), watcher=coordinator)
        failure = coordinator.result(status)
    end = {"exit_status": failure.exit_status if failure else 0, "text": failure.text if failure else ""}
    Path(spec["result"]).write_text(json.dumps(end))
    return int(str(end["exit_status"]))


def _transport(spec: dict[str, Any]) -> int:
    """Starts the agents and waits for them; its status is that of the first one that failed."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _AGENT, "--launch_dir", spec["launch_dir"], "--node", agent["node"]],
            env={name: value for name, value in os.environ.items() if name != process.MARK} | agent.get("env", {}),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for agent in spec["agents"]
    ]
    copiers = [threading.Thread(target=_copy, args=(child,)) for child in running]
    for copier in copiers:
        copier.start()
    for copier in copiers:
        copier.join()
    statuses = [child.wait() for child in running]
    return next((status if status > 0 else 128 - status for status in statuses if status), 0)


def _copy(child: subprocess.Popen[bytes]) -> None:
    """Whole lines, so that those of two nodes do not mix; a progress bar's states as they come."""
    assert child.stdout is not None
    rest = b""
    while chunk := os.read(child.stdout.fileno(), 65536):
        data = rest + chunk
        size = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        lines, rest = data[:size], data[size:]
        with _ONE_AT_A_TIME:
            while lines:
                lines = lines[os.write(1, lines) :]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    raise SystemExit({"launcher": _launcher, "transport": _transport}[sys.argv[1]](given))
