"""DeepSpeed's compiled part on a CPU, built once per set of versions and copied into each run.

DeepSpeed compiles its shared-memory op when it is first used, half a minute, in a folder that all runs of a user share.
A build that is killed leaves a `lock` there, and every later run waits for it for ever. So the op is built here under
a lock that dies with its owner, appears whole or not at all, and each run gets a copy of its own.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

from train import outputs, process
from train.errors import UserError
from train.process import Command

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "torch_extensions"
_BUILD = """
from train.deepspeed_ops import quote_library_path
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
quote_library_path()
ShareMemCommBuilder().load(verbose=False)
"""


def place_ops(extensions_dir: Path, *, cache: Path | None = None) -> None:
    """Makes `extensions_dir`, the run's TORCH_EXTENSIONS_DIR, hold the compiled op and no stale lock.

    Raises:
        UserError: the op cannot be compiled; the compiler's words are in the message.
    """
    versions = "-".join(f"{name}{metadata.version(name)}" for name in ("torch", "deepspeed"))
    built = (cache or _CACHE) / f"python{platform.python_version()}-{versions}-{platform.machine()}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / ".building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel lets go of it when its owner dies
        if not built.is_dir():
            _build(built)
    shutil.rmtree(extensions_dir, ignore_errors=True)
    extensions_dir.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(built, extensions_dir)  # times of change are kept, so nothing is compiled again


def quote_library_path() -> None:
    """Lets the op be linked, and found up to date, by an environment whose path has a space; every rank calls it.

    torch writes its library folder into the linker's command without quotes (torch/utils/cpp_extension.py, 2.13).
    """
    from torch.utils import cpp_extension

    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)


def init_distributed() -> None:
    """Starts DeepSpeed's process group on CPUs, which transformers leaves out with `use_cpu`."""
    import deepspeed

    quote_library_path()
    deepspeed.init_distributed(dist_backend="gloo")


def _build(built: Path) -> None:
    print("compiling DeepSpeed's shared-memory op, once for this set of versions", flush=True)
    with outputs.new_folder(built) as folder:
        environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder), "PATH": _path_with_ninja()}
        code, text = process.capture(Command((sys.executable, "-c", _BUILD), environment), timeout_s=900)
        if code:
            raise UserError(
                "DeepSpeed's shared-memory op cannot be compiled; it needs a C++ compiler and Python's headers"
                f" (Debian: apt-get install g++ python3-dev). The compiler said:\n{text[-2000:]}"
            )


def _path_with_ninja() -> str:
    """PATH with this interpreter's own programs in front: ninja is installed beside it, active environment or not."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
