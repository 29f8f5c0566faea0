"""Hostfiles, in DeepSpeed's format: a line HOST slots=PROCESSES for each node, comments after #.

A line with a host alone is taken too (a scheduler's own list), then in all lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from train.cluster.nodes import Nodes, equal_count, is_host
from train.errors import UserError, refuse

_LINE = re.compile(r"(\S+)(?:\s+slots=(\d+))?")


def read(file: Path) -> Nodes:
    """The nodes that a hostfile names.

    Raises:
        UserError: there is no such file, or what `parse` refuses.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--hostfile {file}: there is no such file; create_hostfile.sh --output {file} makes one."
        ) from None
    except IsADirectoryError:
        raise UserError(f"--hostfile {file} is a folder: name a file of lines 'HOST slots=PROCESSES'.") from None
    except UnicodeDecodeError:
        raise UserError(f"--hostfile {file} is not text: lines 'HOST slots=PROCESSES' were expected.") from None
    hosts = parse(text, str(file))
    slots = None
    if None not in hosts.values():
        slots = equal_count({host: count or 0 for host, count in hosts.items()}, f"hostfile {file}: slots")
    return Nodes("hostfile", f"hostfile {file}", tuple(hosts), slots=slots, origin=f"slots={slots}" if slots else "")


def parse(text: str, name: str = "hostfile") -> dict[str, int | None]:
    """Slots of each host in the file's order, None for hosts without slots.

    Raises:
        UserError: bad lines, hosts named twice, slots on some lines only, or no host; all of them, with line numbers.
    """
    hosts: dict[str, int | None] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None or not is_host(match.group(1)) or int(match.group(2) or 1) < 1:
            problems.append(f"{name}, line {number}: {content!r}; 'HOST slots=PROCESSES' was expected.")
        elif match.group(1).lower() in lines:
            first = lines[match.group(1).lower()]
            problems.append(
                f"{name}, line {number}: {match.group(1)} stands in line {first} already: keep one of them."
            )
        else:
            lines[match.group(1).lower()] = number
            hosts[match.group(1)] = int(match.group(2)) if match.group(2) else None
    without = [host for host, slots in hosts.items() if slots is None]
    if without and len(without) < len(hosts):
        problems.append(f"{name}: no slots for {', '.join(without)}; give them to all hosts, or to none.")
    if not hosts and not problems:
        problems.append(f"{name} names no host: lines 'HOST slots=PROCESSES' were expected.")
    refuse(problems)
    return hosts


def build(hosts: Iterable[str], slots: int) -> str:
    """The text of a hostfile with the same number of processes on each host."""
    return "".join(f"{host} slots={slots}\n" for host in hosts)
