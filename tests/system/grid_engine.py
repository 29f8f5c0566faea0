"""A real Grid Engine on the hosts of tests/system: sge_qmaster on the first, sge_execd on all others.

    with GridEngine(hosts) as grid_engine:
        job = grid_engine.submit("-pe", "mpi", "2", "-l", "h_rt=60", "job.sh")
        grid_engine.wait_for(job)["exit_status"]

The queue all.q has four slots per host; the parallel environment `mpi` deals slots out in turn, so `-pe mpi 2` is two
hosts, and so is `-l rt_F=2`, as on ABCI. As Debian sets it up, a script without `-S /bin/bash` runs in /bin/sh. The
package's cell and spool folders are covered on the hosts, and stay as they are on this machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hosts import Hosts, wait_until  # type: ignore[import-not-found]

ROOT = Path("/var/lib/gridengine")
SPOOL = Path("/var/spool/gridengine")
TOOLS = Path("/usr/lib/gridengine")
SHARE = Path("/usr/share/gridengine")
SLOTS = 4
_PARALLEL_ENVIRONMENT = """\
pe_name            mpi
slots              999
user_lists         NONE
xuser_lists        NONE
start_proc_args    NONE
stop_proc_args     NONE
allocation_rule    $round_robin
control_slaves     TRUE
job_is_first_task  FALSE
urgency_slots      min
accounting_summary TRUE
qsort_args         NONE
"""
_EXECUTION_HOST = """\
hostname              {name}
load_scaling          NONE
complex_values        NONE
user_lists            NONE
xuser_lists           NONE
projects              NONE
xprojects             NONE
usage_scaling         NONE
report_variables      NONE
"""
# ABCI's way to ask for whole nodes: -l rt_F=NODES, without a parallel environment. Its verifier is not public; this one
# does what its users see. It speaks the protocol of jsv(1): PARAM lines up to BEGIN, and the changes as an answer.
_NODES_BY_RESOURCE = """\
#!/bin/bash
while read -r command name value; do
    case "$command" in
        START) resources=""; echo STARTED ;;
        PARAM) [[ "$name" != l_hard ]] || resources=",$value," ;;
        BEGIN)
            if [[ "$resources" =~ ,rt_F=([0-9]+), ]]; then
                others="${resources/,rt_F=${BASH_REMATCH[1]},/,}"
                others="${others#,}"
                printf 'PARAM %s\\n' "l_hard ${others%,}" "pe_name mpi" \
                    "pe_min ${BASH_REMATCH[1]}" "pe_max ${BASH_REMATCH[1]}"
                echo RESULT STATE CORRECT
            else
                echo RESULT STATE ACCEPT
            fi ;;
        QUIT) exit ;;
    esac
done
"""
_NODES_RESOURCE = """\
name        rt_F
shortcut    rt_F
type        INT
relop       <=
requestable YES
consumable  NO
default     0
urgency     0
"""


class GridEngine:
    """The running Grid Engine. `head` is the host of the queue master, where users log in; `nodes` are the others."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.head, *self.nodes = hosts.names
        self.folder: Path = hosts.folder / "grid_engine"

    def __enter__(self) -> GridEngine:
        self._lay_out()
        for command in (
            [f"{TOOLS}/spoolinit", "berkeleydb", "libspoolb", f"{SPOOL}/spooldb", "init"],
            [f"{TOOLS}/spooldefaults", "configuration", f"{SPOOL}/configuration"],
            [f"{TOOLS}/spooldefaults", "complexes", f"{self.folder}/resources"],
            [f"{TOOLS}/spooldefaults", "usersets", f"{SHARE}/util/resources/usersets"],
            [f"{TOOLS}/spooldefaults", "managers", "root"],
            ["sge_qmaster"],
        ):
            self.run(*command)
        wait_until(
            lambda: self.run("qconf", "-sh", check=False).returncode == 0, f"sge_qmaster; see {self._messages()}"
        )
        self._configure()
        for name in self.nodes:
            self.hosts.run(name, ["sge_execd"], env=self._environment(), check=True)
        wait_until(self._all_ready, f"Grid Engine's hosts to report; see {self._messages()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.hosts.names:
            self.hosts.run(name, ["pkill", "-KILL", "sge_"])

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command where users log in."""
        environment = {**self._environment(), **(env or {})}
        return self.hosts.run(self.head, argv, env=environment, timeout_s=timeout_s, check=check)

    def submit(self, *qsub_arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Runs qsub and returns the job's id."""
        return self.run("qsub", "-terse", *map(str, qsub_arguments), env=env).stdout.strip()

    def state(self, job: str) -> str:
        """The job's letters in qstat (qw, r, dr, Eqw, ...), or nothing when it has left the queue."""
        lines = self.run("qstat", "-u", "*").stdout.splitlines()
        return next((line.split()[4] for line in lines if line.split()[:1] == [job]), "")

    def wait_for(self, job: str, state: str = "", timeout_s: float = 60) -> dict[str, str]:
        """Waits until qstat shows `state`; without one, until the job has ended, and returns what qacct tells of it."""
        what = f"Grid Engine's job {job} to be {state or 'over'}; see {self._messages()}"
        wait_until(lambda: self.state(job) == state, what, timeout_s)
        if state:
            return {}
        wait_until(lambda: self._answers("qacct", "-j", job), f"{what} and accounted for")
        return dict(re.findall(r"^(\w+) +(.*?) *$", self.run("qacct", "-j", job).stdout, re.MULTILINE))

    def heal(self) -> None:
        """Deletes all jobs and waits until they are gone; clears what made a queue or a job stop."""
        if self.run("qstat", "-u", "*").stdout:
            self.run("qdel", "-f", "-u", "*", check=False)
        for name in self.nodes:
            if not any(process.name == "sge_execd" for process in self.hosts.processes(name)):
                self.hosts.run(name, ["sge_execd"], env=self._environment(), check=True)
        wait_until(lambda: not self.run("qstat", "-u", "*").stdout, "Grid Engine's queue to be empty")
        self.run("qmod", "-c", "all.q", check=False)
        wait_until(self._all_ready, f"Grid Engine's hosts to report; see {self._messages()}")

    def _lay_out(self) -> None:
        """The files that the package's own set-up would write, in folders of this test's own."""
        common, spool = self.folder / "default" / "common", self.folder / "spool"
        for folder in (common, spool / "qmaster" / "job_scripts", spool / "spooldb", spool / "execd"):
            folder.mkdir(parents=True)
        bootstrap = (SHARE / "default-bootstrap").read_text()
        # root and not the package's own user: the test session's folder lets nobody else in.
        (common / "bootstrap").write_text(_with_values(bootstrap, {"admin_user": "root"}))
        (common / "act_qmaster").write_text(f"{self.head}\n")
        (common / "settings.sh").write_text(
            "".join(f"{name}={value}; export {name}\n" for name, value in self._environment().items())
        )
        configuration = (SHARE / "default-configuration").read_text()
        quick = {"min_uid": "0", "min_gid": "0", "load_report_time": "00:00:02", "mailer": "/bin/true"}
        quick["reporting_params"] = "accounting=true reporting=false flush_time=00:00:01 joblog=false sharelog=00:00:00"
        verifier = self.folder / "nodes_by_resource.sh"
        verifier.write_text(_NODES_BY_RESOURCE)
        verifier.chmod(0o755)
        quick["jsv_url"] = f"script:{verifier}"
        (spool / "configuration").write_text(_with_values(configuration, quick))
        shutil.copytree(SHARE / "util" / "resources" / "centry", self.folder / "resources")
        (self.folder / "resources" / "rt_F").write_text(_NODES_RESOURCE)
        self.hosts.lay_over(self.folder / "default", str(ROOT / "default"))
        self.hosts.lay_over(spool, str(SPOOL))

    def _configure(self) -> None:
        self.run("qconf", "-as", ",".join(self.hosts.names))
        self.run("qconf", "-ah", ",".join(self.hosts.names))
        for name in self.nodes:
            self._add("-Ae", _EXECUTION_HOST.format(name=name))
        self._add("-Ahgrp", f"group_name @allhosts\nhostlist {' '.join(self.nodes)}\n")
        self._add("-Ap", _PARALLEL_ENVIRONMENT)
        queue = {"qname": "all.q", "hostlist": "@allhosts", "slots": str(SLOTS), "pe_list": "mpi",
                 "load_thresholds": "NONE", "rerun": "FALSE"}  # fmt: skip
        self._add("-Aq", _with_values(self.run("qconf", "-sq").stdout, queue))
        quick = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
        self._add("-Msconf", _with_values(self.run("qconf", "-ssconf").stdout, quick))

    def _add(self, option: str, text: str) -> None:
        file = self.folder / f"qconf{option}"
        file.write_text(text)
        self.run("qconf", option, str(file))

    def _all_ready(self) -> bool:
        """Every queue instance is there and has reported a load: its state letters are empty."""
        lines = self.run("qstat", "-f", check=False).stdout.splitlines()
        instances = [line.split() for line in lines if line.startswith("all.q@")]
        return len(instances) == len(self.nodes) and all(len(words) == 5 and words[3] != "-NA-" for words in instances)

    def _answers(self, *argv: str) -> bool:
        return self.run(*argv, check=False).returncode == 0

    def _environment(self) -> dict[str, str]:
        return {"SGE_ROOT": str(ROOT), "SGE_CELL": "default"}

    def _messages(self) -> str:
        return f"{self.folder}/spool/**/messages"


def _with_values(table: str, values: Mapping[str, str]) -> str:
    """A file of lines 'name value', continued after a backslash, with other values for some names that are in it."""
    table = table.replace("\\\n", " ")
    for name, value in values.items():
        table, found = re.subn(rf"^{name}\s.*$", f"{name} {value}", table, flags=re.MULTILINE)
        assert found == 1, f"{name} is {found} times in\n{table}"
    return table
