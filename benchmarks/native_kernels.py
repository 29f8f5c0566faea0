#!/usr/bin/env python3
"""apex's and flash-attn's kernels beside torch's, one at a time: time, and distance from the exact result.

Layer norm, RMS norm and causal attention, forwards and backwards, in bf16, in the shapes of `gpt_1.3B`; an Adam step
over as many fp32 parameters. Times are medians of what the GPU itself takes, from a cold L2 cache: the launches wait in
a queue first, as they do in training. Errors are the largest differences from float64, for the same rounded inputs, as
a part of the largest exact value (Adam: of the largest change), on a smaller slice. A kernel that is not installed is a
line that says so.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from native_contenders import Kernel, MissingError, adam_kernel, attention_kernel, norm_kernels

from train import cli, outputs
from train.errors import UserError
from train.settings import setting

_PACKAGES = ("torch", "triton", "apex", "flash_attn", "deepspeed", "nvidia-cudnn-cu13")
_HEADINGS = ("kernel", "by", "ms", "rate", "error of the output", "error of the gradients")


@dataclass(frozen=True)
class KernelSettings:
    """What to measure."""

    output_dir: Path = setting(Path("output/benchmarks/native_kernels"), help="folder for results.json")
    kernels: tuple[str, ...] = setting(
        ("layer_norm", "rms_norm", "attention", "adam"), help="layer_norm, rms_norm, attention, adam"
    )
    device: str = setting("cuda", help="where to measure", choices=("cuda", "cpu"))
    micro_batch_size: int = setting(16, help="sequences")
    sequence_length: int = setting(2048, help="tokens per sequence")
    hidden_size: int = setting(2048, help="values per token")
    head_dims: tuple[int, ...] = setting((128, 64), help="values per attention head; their heads fill the hidden size")
    adam_parameters: int = setting(
        1_314_000_000, help="fp32 parameters of an Adam step, in one tensor as ZeRO keeps them"
    )
    compiled: bool = setting(True, help="measure what torch.compile makes of the norms, too")
    repeats: int = setting(30, help="timed calls of each; their median counts")
    warm_up: int = setting(5, help="calls before them")


def measure(settings: KernelSettings) -> int:
    """Prints a Markdown table; results.json keeps the numbers.

    Raises:
        UserError: there is no GPU, or a setting is none.
    """
    import torch

    _check(settings)
    machine = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    versions = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    print(f"{machine}, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    shape = f"{settings.micro_batch_size} x {settings.sequence_length} x {settings.hidden_size}"
    print(f"{shape}, bf16; Adam over {settings.adam_parameters:,} fp32 parameters")
    print(f"| {' | '.join(_HEADINGS)} |\n|---|---|---:|---:|---:|---:|", flush=True)
    rows = []
    for kernel in _kernels(settings):
        for name in kernel.contenders:
            rows.append(_row(settings, kernel, name))
            print(_line(rows[-1]), flush=True)
    results = {"machine": machine, "versions": versions, "shape": shape, "rows": rows}
    outputs.write_text(settings.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    return 1 if any("error" in row for row in rows) else 0


def _check(settings: KernelSettings) -> None:
    import torch

    problems = []
    unknown = set(settings.kernels) - {"layer_norm", "rms_norm", "attention", "adam"}
    if unknown:
        problems.append(f"--kernels {' '.join(sorted(unknown))}: there are layer_norm, rms_norm, attention and adam.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no GPU here; --device cpu tries the program out, on small shapes.")
    for head_dim in settings.head_dims:
        if head_dim < 1 or settings.hidden_size % head_dim:
            problems.append(f"--head_dims {head_dim}: --hidden_size {settings.hidden_size} is no multiple of it.")
    if settings.repeats < 1:
        problems.append(f"--repeats {settings.repeats}: at least one call is timed.")
    if problems:
        raise UserError(problems)


def _kernels(settings: KernelSettings) -> Iterator[Kernel]:
    """One after the other, so that only one's tensors are on the GPU."""
    rows, device = settings.micro_batch_size * settings.sequence_length, settings.device
    for kernel in norm_kernels(rows, settings.hidden_size, device=device, compiled=settings.compiled):
        if kernel.name in settings.kernels:
            yield kernel
    for head_dim in settings.head_dims if "attention" in settings.kernels else ():
        heads = settings.hidden_size // head_dim
        yield attention_kernel(settings.micro_batch_size, settings.sequence_length, heads, head_dim, device=device)
    if "adam" in settings.kernels:
        yield adam_kernel(settings.adam_parameters, device=device)


def _row(settings: KernelSettings, kernel: Kernel, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": kernel.title, "by": name}
    try:
        function = kernel.contenders[name]()
        error_of_output, error_of_gradients = kernel.errors(function)
        call = kernel.prepare(function)
        milliseconds = _milliseconds(call, settings)
    except (ModuleNotFoundError, MissingError) as missing:
        return {**row, "missing": f"not installed ({missing})"}
    except Exception as error:  # one that does not run here must not hide the others
        return {**row, "error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"}
    return {
        **row,
        "ms": statistics.median(milliseconds),
        "fastest_ms": min(milliseconds),
        "slowest_ms": max(milliseconds),
        "rate": kernel.work / statistics.median(milliseconds) * 1e3 / kernel.unit_size,
        "unit": kernel.unit,
        "error_of_output": error_of_output,
        "error_of_gradients": error_of_gradients,
    }


def _milliseconds(call: Callable[[], None], settings: KernelSettings) -> list[float]:
    """What each of the timed calls took."""
    import torch

    for _ in range(settings.warm_up):
        call()
    if settings.device == "cpu":
        times = []
        for _ in range(settings.repeats):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return times
    cold = torch.empty(2**26, dtype=torch.float32, device="cuda")  # 256 MiB: more than any L2 cache
    pairs = []
    for _ in range(settings.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # some 5 ms in which Python launches all of the call: its own time is not meant
        cold.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        pairs.append((start, end))
    return [start.elapsed_time(end) for start, end in pairs]


def _line(row: dict[str, Any]) -> str:
    cells = [row["kernel"], row["by"]]
    told = row.get("missing") or row.get("error")
    if told:
        cells += [told, "", "", ""]
    else:
        gradients = row["error_of_gradients"]
        cells += [f"{row['ms']:.3f}", f"{row['rate']:,.0f} {row['unit']}", f"{row['error_of_output']:.1e}"]
        cells.append("" if gradients is None else f"{gradients:.1e}")
    return f"| {' | '.join(cells)} |"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    example = f"{Path(sys.argv[0]).name} --kernels attention adam"
    return cli.run(KernelSettings, measure, argv, description=__doc__, example=example)


if __name__ == "__main__":
    raise SystemExit(main())
