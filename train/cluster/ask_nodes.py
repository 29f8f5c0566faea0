"""GPUs of each node, asked of the nodes themselves through ssh, all at once.

gpus = ask_nodes.gpus(hosts, config=folder / "ssh_config", this_host="node1")
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train import process
from train.cluster import ssh
from train.errors import refuse

_QUESTION = ("nvidia-smi", "--list-gpus")
_AT_ONCE = 32
_TIMEOUT_S = 60.0
_NOT_FOUND = 127
_SSH_FAILED = 255


def gpus(hosts: Sequence[str], *, config: Path, this_host: str | None) -> dict[str, int]:
    """GPUs of each host, in the order of `hosts`; 0 where there is no nvidia-smi.

    Args:
        hosts: the nodes.
        config: ssh configuration to reach them with.
        this_host: the one among them that asks; it needs no ssh.

    Raises:
        UserError: hosts that ssh does not reach, or whose nvidia-smi fails; all of them.
    """

    def ask(host: str) -> tuple[int, str]:
        if host == this_host:
            return process.capture(process.Command(_QUESTION), timeout_s=_TIMEOUT_S)
        return process.capture(ssh.build_command(host, _QUESTION, config=config), timeout_s=_TIMEOUT_S)

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    refuse(problem for host, (status, text) in answers.items() if (problem := _problem(host, status, text)))
    return {host: 0 if status == _NOT_FOUND else parse_gpus(text) for host, (status, text) in answers.items()}


def parse_gpus(text: str) -> int:
    """GPUs in the output of `nvidia-smi --list-gpus`, a line each; MIG instances stand indented and do not count."""
    return sum(line.startswith("GPU ") for line in text.splitlines())


def _problem(host: str, status: int, text: str) -> str | None:
    if status in (0, _NOT_FOUND):
        return None
    why = ssh.reason_of_failure(text)
    if status == _SSH_FAILED:
        return f"{host}: ssh does not reach it ({why}): try it by hand, or see to its port, user and key."
    return f"{host}: nvidia-smi failed with exit code {status} ({why}): see to its driver, or leave the node out."
