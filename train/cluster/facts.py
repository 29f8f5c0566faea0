"""What a node tells of itself before its GPUs are taken, in a fraction of a second: nothing heavy is imported.

`collect` runs in the agent; `train.cluster.preflight` holds the nodes' facts against each other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train import process
from train.cluster import network
from train.cluster.allocation import count_gpus
from train.process import Command

_PACKAGES = ("deepspeed", "transformers", "accelerate", "trl", "numpy", "sentencepiece", "flash-attn", "apex")


def collect(invitation: dict[str, Any]) -> dict[str, Any]:
    """This node's facts as plain data.

    Args:
        invitation: what the launcher wrote for its agents: the job's name, the paths that every node must see, and
            the interface, if one was asked for.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    torch = _torch()
    count = count_gpus(os.environ)
    gpu, driver = _gpu() if count else (None, None)
    interface = invitation.get("interface")
    temporary = _temporary_folder()
    return {
        "host": os.uname().nodename,
        "boot": _boot(),
        "clock": time.time(),
        "free_port": network.free_port(f"{invitation.get('job')} {invitation.get('port')}"),
        "interface": interface,
        "interface_address": network.interface_address(interface) if interface else None,
        "interpreter": sys.executable,
        "python": platform.python_version(),
        "torch": torch.get("version"),
        "CUDA": torch.get("cuda"),
        "NCCL": next((found for name in ("cu13", "cu12", "cu11") if (found := _version(f"nvidia-nccl-{name}"))), None),
        **{name: version for name, version in versions.items() if version},
        "engine": _engine_commit(invitation.get("engine_dir")),
        "driver": driver,
        "GPU": gpu,
        "GPUs": count,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "temporary folder": temporary,
        "free MiB there": shutil.disk_usage(temporary).free >> 20,
        "unseen": [path for path in invitation.get("paths", ()) if not Path(path).exists()],
    }


def _boot() -> str | None:
    """What the kernel calls its present boot (random(4)): no two machines share it. None where it does not say."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii").strip() if file.is_file() else None


def _temporary_folder() -> str:
    """Where programs put temporary files. Python itself passes over a full disk, and takes the run's folder at last."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return next((folder for folder in (*named, "/tmp") if folder and Path(folder).is_dir()), tempfile.gettempdir())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, str]:
    """torch's version and its CUDA, read from its version.py: importing torch would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = {}
    for key, pattern in (("version", r"__version__ = '([^']+)'"), ("cuda", r"^cuda(?:: [^=]+)? = '([^']+)'")):
        match = re.search(pattern, text, re.MULTILINE)
        if match is not None:
            found[key] = match[1]
    return found


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver version of the first GPU."""
    command = Command(("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"))
    status, text = process.capture(command, timeout_s=30)
    first = next((line for line in text.splitlines() if "," in line), "")
    if status != 0 or not first:
        return None, None
    name, _, driver = first.rpartition(",")
    return name.strip(), driver.strip()


def _engine_commit(folder: str | None) -> str | None:
    """The engine's commit as this node sees it."""
    if folder is None:
        return None
    status, text = process.capture(Command(("git", "-C", folder, "rev-parse", "HEAD")))
    return text.strip() if status == 0 else f"none in {folder}"
