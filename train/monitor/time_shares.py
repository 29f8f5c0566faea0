"""Where the time of a recorded step went: a trace of torch's profiler, summed up by kinds of work.

    shares = time_shares(read_events(Path("step12_rank0.trace.json.gz")), seconds=2.01)

Every instant counts once: for computation when any computes, for communication only where nothing else runs beside it,
and for nothing when the processor (a GPU, or the CPU's threads in a run without one) had no work.
The format is Chrome's trace events: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

COMMUNICATION, OTHER, NOTHING = "communication", "other kernels", "nothing"
# The first pattern that is in a kernel's name decides. Libraries of communication have names of their own, whatever
# else their kernels' say; torch.compile's hold the names of what they were made from; flash-attn's say "cutlass".
_PATTERNS = (
    (COMMUNICATION, r"nccl|gloo|c10d|multimem|symm_mem|ModelParallelRegion"),
    ("compiled regions", r"triton"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|aten::(addmm|b?mm|_scaled_mm|linear|matmul|baddbmm)$"),
    ("optimizer", r"adam|multi_tensor|_foreach_"),
    ("copies", r"memcpy|memset|copy|catarray|aten::(cat|clone|contiguous|fill_|zero_)$"),
)
# Where two run at once, the instant counts for the first of these.
KINDS = ("attention", "matrix products", "optimizer", "compiled regions", "copies", OTHER, COMMUNICATION, NOTHING)
_KINDS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _PATTERNS)
_LISTED = 20
_Name = TypeVar("_Name")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Event:
    """One piece of work: its kernel's or operator's name, and from when to when it ran, in microseconds.

    `is_begin` is false for what an operator did after it had called another.
    """

    name: str
    start_us: float
    end_us: float
    is_begin: bool = True


def kind_of(name: str) -> str:
    """The kind of work that a kernel's or operator's name tells of."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHER)


def read_events(trace: Path) -> list[Event]:
    """The work in a trace: the GPU's kernels and copies, or without any, what each operator on the CPU did itself.

    Raises:
        OSError, ValueError: the file is not there or not whole.
    """
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt", encoding="utf-8", errors="replace") as stream:
        found = [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]
    on_gpu = [_event(event) for event in found if event.get("cat") in _ON_GPU]
    if on_gpu:
        return on_gpu
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in found:
        if event.get("cat") == "cpu_op":
            threads[event.get("tid")].append(_event(event))
    return [own for events in threads.values() for own in _own_time(events)]


def _event(record: dict[str, Any]) -> Event:
    start = float(record["ts"])
    return Event(str(record["name"]), start, start + float(record.get("dur", 0)))


def _own_time(events: list[Event]) -> Iterator[Event]:
    """Nested operators of one thread, cut into the stretches in which each was the innermost."""
    open_ones: list[Event] = []
    since = 0.0

    def stretch(until: float) -> Event:
        inner = open_ones[-1]
        return Event(inner.name, since, max(since, until), is_begin=since == inner.start_us)

    for event in sorted(events, key=lambda one: (one.start_us, -one.end_us)):
        while open_ones and open_ones[-1].end_us <= event.start_us:
            yield stretch(open_ones[-1].end_us)
            since = open_ones.pop().end_us
        if open_ones:
            yield stretch(event.start_us)
        open_ones.append(event)
        since = event.start_us
    while open_ones:
        yield stretch(open_ones[-1].end_us)
        since = max(since, open_ones.pop().end_us)


def time_shares(events: Iterable[Event], *, seconds: float) -> dict[str, Any]:
    """Sums the work of one step up.

    Args:
        events: the step's work, in any order.
        seconds: how long the step took by the clock.

    Returns:
        `seconds`; `kinds`: seconds of each kind in KINDS, which add up to the step; `hidden_communication`: seconds
        of communication beside which something was computed;
        `longest`: the kernels that took the most time, each with `name`, `kind`, `calls` and `seconds`;
        `gaps`: between which kernels there was nothing for longest, with `after`, `before`, `calls` and `seconds`.
    """
    events = sorted(events, key=lambda event: event.start_us)
    named: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = defaultdict(int)
    edges: list[tuple[float, int, str]] = []
    for event in events:
        kind = kind_of(event.name)
        named[event.name].append(event.end_us - event.start_us)
        calls[event.name] += event.is_begin
        edges += [(event.start_us, 1, kind), (event.end_us, -1, kind)]
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    running: dict[str, int] = dict.fromkeys(KINDS, 0)
    hidden = before = 0.0
    for time_us, change, kind in sorted(edges):
        shown = next((name for name in KINDS if running[name]), None)
        if shown is not None:
            spent[shown] += time_us - before
            if shown != COMMUNICATION and running[COMMUNICATION]:
                hidden += time_us - before
        running[kind] += change
        before = time_us
    kinds = {name: us / 1e6 for name, us in spent.items()}
    kinds[NOTHING] = max(0.0, seconds - sum(kinds.values()))
    return {
        "seconds": seconds,
        "kinds": kinds,
        "hidden_communication": hidden / 1e6,
        "longest": [
            {"name": name, "kind": kind_of(name), "calls": calls[name], "seconds": sum(times) / 1e6}
            for name, times in _most(named)
        ],
        "gaps": [
            {"after": after, "before": before, "calls": len(times), "seconds": sum(times) / 1e6}
            for (after, before), times in _most(_gaps(events))
        ],
    }


def _gaps(events: Iterable[Event]) -> dict[tuple[str, str], list[float]]:
    """Microseconds without any work, by the names of what ended before and began after; events in order."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    last: Event | None = None
    for event in events:
        if last is not None and event.start_us > last.end_us:
            found[last.name, event.name].append(event.start_us - last.end_us)
        if last is None or event.end_us > last.end_us:
            last = event
    return found


def _most(named: Mapping[_Name, list[float]]) -> list[tuple[_Name, list[float]]]:
    return sorted(named.items(), key=lambda item: -sum(item[1]))[:_LISTED]
