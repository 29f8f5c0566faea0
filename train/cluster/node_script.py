"""The environment script of a run: every node starts by it, by absolute path, and no dotfile is read.

    outputs.write_text(launch_dir / "node.sh", build(...))

It carries what the launcher's own environment has and a bare login on another node lacks. Values of secrets are not in
it: they reach the ranks through the launcher's connection.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from train import process
from train.cluster.secrets import PROXIES, holds_password

_CARRIED = {
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "MODULEPATH",
    "LANG", "LC_ALL", *PROXIES,
}  # fmt: skip
_CARRIED_PREFIXES = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_",
    "CUDA_DEVICE_", "DS_", "HF_", "TRANSFORMERS_", "DATASETS_", "WANDB_", "TRAIN_", "MEGATRON_",
)  # fmt: skip
_MODULE_INITS = (
    "${MODULESHOME:-}/init/bash", "/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh", "/usr/share/modules/init/bash",
    "/usr/share/lmod/lmod/init/bash",
)  # fmt: skip


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that go to every node: paths, and the libraries' settings. No secrets, nothing of this node."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in _CARRIED or name.startswith(_CARRIED_PREFIXES))
        and not process.is_secret(name)
        and not holds_password(value)
        and name != process.MARK
    }


def build(
    *,
    python: str,
    launch_dir: Path,
    working_dir: Path,
    environment: Mapping[str, str],
    modules: Sequence[str] = (),
    node_setup: Path | None = None,
    max_open_files: int,
) -> str:
    """The script as text; its arguments go on to the agent.

    Args:
        python: the interpreter, by absolute path.
        launch_dir: where the launcher wrote how to reach it (`train.cluster.agent`).
        working_dir: where the ranks start.
        environment: variables to set, mostly `carried(os.environ)`.
        modules: environment modules to load.
        node_setup: a bash file to source.
        max_open_files: the wanted limit of open files.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Made for one run, started on each of its nodes. Reads no dotfile; holds no secret.",
        'fail() { echo "error: $(uname -n): $1" >&2; exit "${2:-2}"; }',
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
    ]
    if modules:
        inits = " ".join(f'"{path}"' for path in _MODULE_INITS)
        lines += [
            f"for file in {inits}; do",
            '    if ! type module >/dev/null 2>&1 && [[ -f "${file}" ]]; then source "${file}"; fi',
            "done",
            'type module >/dev/null 2>&1 || fail "environment modules are not installed, --modules needs them"',
        ]
        for name in modules:
            lines.append(f"module load {shlex.quote(name)} || {_fail(f'module load {name} failed')}")
    if node_setup is not None:
        file = shlex.quote(str(node_setup))
        lines += [
            f"[[ -f {file} && -r {file} ]] || {_fail(f'--node_setup {node_setup} cannot be read here')}",
            "ended() {",
            "    status=$?",
            "    trap - EXIT",
            f'    {_fail(f"--node_setup {node_setup} failed with status ")}"${{status}}"',
            "}",
            "trap ended EXIT  # it may exit, and this shell with it",
            f"source {file} || ended",
            "trap - EXIT",
        ]
    interpreter, folder = shlex.quote(python), shlex.quote(str(working_dir))
    lines += [
        "hard=$(ulimit -Hn)",
        f'if [[ "${{hard}}" == unlimited || "${{hard}}" -ge {max_open_files} ]]; then hard={max_open_files}; fi',
        'ulimit -Sn "${hard}" 2>/dev/null || true',
        f"[[ -x {interpreter} ]] || {_fail(f'there is no {python}: install the environment where every node sees it')}",
        f"cd {folder} || {_fail(f'there is no {working_dir}: the run must stand where every node sees it')}",
        # -P: the folder may hold a train.py of the user's own
        f'reason=$({interpreter} -P -c "import train.cluster.agent" 2>&1) ||'
        f" fail {interpreter}\" has no package train: ${{reason##*$'\\n'}}\"",
        f'exec {interpreter} -P -m train.cluster.agent --launch_dir {shlex.quote(str(launch_dir))} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _fail(message: str) -> str:
    return f"fail {shlex.quote(message)}"
