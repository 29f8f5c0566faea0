"""ssh between the nodes of one run: a configuration of the run's own, passed with `ssh -F`, and the command to use it.

    text = ssh.build_config(hosts, port=2222, known_hosts=folder / "known_hosts", included=ssh.included_files())

Format: ssh_config(5), where the first value that is given wins. Nothing of the user's ~/.ssh is written: it is read,
after ours, so that ProxyJump, IdentityFile or HostName that a user has set for a node go on to work.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from train.cluster.nodes import is_host
from train.errors import refuse
from train.process import Command

DEFAULT_PORT = 22
_SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_USER_CONFIG = "~/.ssh/config"  # the tilde stays: ssh knows the user's home by the account, not by $HOME
_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_UNQUOTABLE = re.compile(r'["\\%\x00-\x1f]|\$\{')  # ssh reads these even between quotes, each version its own way
_OUR_SETTINGS = """\
    # never asks: a run that waits for a password in a queue waits for its time limit
    BatchMode yes
    # a new host's key is noted in the first file; a key that has changed is refused
    StrictHostKeyChecking accept-new
    UserKnownHostsFile {known_hosts} ~/.ssh/known_hosts
    ConnectTimeout {connect_timeout_s}
    # a node that goes away answers no more, and TCP alone waits a quarter of an hour: this ends ssh within 20 s
    ServerAliveInterval 5
    ServerAliveCountMax 3
    # a shared connection outlives its command, and forwarded ports are taken once several nodes are reached at once
    ControlMaster no
    ControlPath none
    ClearAllForwardings yes
"""


def build_config(
    hosts: Sequence[str],
    *,
    known_hosts: Path,
    port: int = DEFAULT_PORT,
    user: str | None = None,
    identity_file: Path | None = None,
    host_names: dict[str, str] | None = None,
    connect_timeout_s: int = 10,
    included: Sequence[str] = (_USER_CONFIG,),
) -> str:
    """The text of an ssh configuration for `hosts`.

    Args:
        hosts: the nodes, by the names that ssh is called with.
        known_hosts: file of the run's own that takes new host keys; absolute.
        port: the nodes' ssh port. 22, ssh's own default, stands last, so that a port in the user's files wins.
        user: login name, when it is another one than here.
        identity_file: private key to offer first.
        host_names: addresses of nodes whose name does not resolve; elsewhere the user's HostName counts.
        connect_timeout_s: seconds until a host that does not answer is given up.
        included: files read after all this, missing ones are skipped by ssh; `included_files()` for a real run.

    Raises:
        UserError: a name or path that ssh would read as something else; all of them.
    """
    names = host_names or {}
    paths = [known_hosts, *([identity_file] if identity_file else [])]
    problems = [f"{host!r} cannot be a host name: letters, digits, dots and dashes were expected."
                for host in (*hosts, *names.values()) if not is_host(host)]  # fmt: skip
    problems += [f'{path}: ssh cannot be told of a path with ", \\, % or ${{: choose another one.'
                 for path in paths if _UNQUOTABLE.search(str(path))]  # fmt: skip
    if user is not None and not _USER_NAME.fullmatch(user):
        problems.append(f"{user!r} cannot be a login name.")
    if not hosts:
        problems.append("there is no host to write an ssh configuration for.")
    refuse(problems)
    lines = [_HEADER]
    for host, name in names.items():
        lines += [f"Host {host}", f"    HostName {name}"]
    lines.append(f"Host {' '.join(hosts)}")
    if port != DEFAULT_PORT:
        lines.append(f"    Port {port}")
    if user is not None:
        lines.append(f"    User {user}")
    if identity_file is not None:
        lines.append(f"    IdentityFile {_quoted(identity_file.absolute())}")
    ours = _OUR_SETTINGS.format(known_hosts=_quoted(known_hosts.absolute()), connect_timeout_s=connect_timeout_s)
    lines.append(ours.rstrip("\n"))
    lines += ["# the user's and the system's own settings: -F alone would leave them out", "Host *"]
    lines += [f"    Include {file}" for file in included]
    if port == DEFAULT_PORT:
        lines.append(f"    Port {port}")
    return "\n".join(lines) + "\n"


def included_files() -> tuple[str, ...]:
    """The configurations that ssh reads by itself. The system's is left out where an Include of it would be refused.

    ssh includes only files that belong to root or the user and that others cannot write; in a container without root,
    root's files belong to nobody.
    """
    try:
        status = _SYSTEM_CONFIG.stat()
    except OSError:
        return (_USER_CONFIG,)
    is_safe = status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return (_USER_CONFIG, str(_SYSTEM_CONFIG)) if is_safe else (_USER_CONFIG,)


def build_command(host: str, argv: Sequence[str], *, config: Path) -> Command:
    """The ssh command that runs `argv` on `host`; the far shell gets it quoted."""
    return Command(("ssh", "-T", "-F", str(config), host, shlex.join(argv)))


def reason_of_failure(output: str) -> str:
    """The line of ssh's output that says why it failed: its last one, without warnings."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("Warning:")]
    return lines[-1] if lines else "ssh said nothing"


def _quoted(path: Path) -> str:
    return f'"{path}"'


_HEADER = """\
# The ssh configuration of one run: ssh -F THIS_FILE HOST. The first value given wins (ssh_config(5))."""
