"""DeepSpeed's compiled ops: the one for shared memory is left out, the others link and find no stale lock."""

from __future__ import annotations

import subprocess
import sys

from train import deepspeed_ops

_RANK = """
import os
from pathlib import Path
from train.deepspeed_ops import prepare_rank
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
before = set(Path("/dev/shm").iterdir())
prepare_rank("cpu")
import torch
box = torch.ones(3)
torch.distributed.all_reduce(box)
assert box.tolist() == [1, 1, 1]
print(sorted(path.name for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("deepspeed")))
"""


def test_a_rank_starts_without_compiling_and_leaves_nothing_in_shared_memory(tmp_path):
    environment = {"PATH": "/nowhere", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")}
    done = subprocess.run([sys.executable, "-c", _RANK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "ext").exists()


def test_torchs_library_folder_reaches_the_linker_as_one_word(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/a copy/torch/lib")
    deepspeed_ops.quote_library_path()
    assert "-L'/a copy/torch/lib'" in cpp_extension._prepare_ldflags([], False, False, False, False)


def test_stale_locks_go_and_what_was_built_stays(tmp_path):
    op = tmp_path / "cpu_adam"
    op.mkdir()
    (op / "lock").write_text("")
    (op / "cpu_adam.so").write_text("")
    deepspeed_ops.remove_stale_locks(tmp_path)
    deepspeed_ops.remove_stale_locks(tmp_path / "not there")
    assert [path.name for path in op.iterdir()] == ["cpu_adam.so"]
