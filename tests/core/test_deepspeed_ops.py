"""DeepSpeed's CPU op: built once, whole, and each run gets a copy without anybody's lock."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import deepspeed_ops, process
from train.errors import UserError


def test_a_failed_build_shows_the_compiler_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_ops, "_BUILD", "raise SystemExit('no such compiler')")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler[^$]*no such compiler"):
        deepspeed_ops.place_ops(tmp_path / "run", cache=tmp_path / "cache")
    assert not (tmp_path / "run").exists()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".building"]


def test_it_is_built_once_and_a_stale_lock_in_a_run_does_no_harm(tmp_path, monkeypatch):
    builds = []

    def compile_it(command, **_):
        builds.append(command)
        folder = Path(command.environment["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm"
        folder.mkdir()
        (folder / "deepspeed_shm_comm.so").write_text("op")
        return 0, ""

    monkeypatch.setattr(process, "capture", compile_it)
    run = tmp_path / "run"
    deepspeed_ops.place_ops(run, cache=tmp_path / "cache")
    (run / "deepspeed_shm_comm" / "lock").write_text("")  # what a killed rank leaves
    deepspeed_ops.place_ops(run, cache=tmp_path / "cache")
    assert len(builds) == 1
    assert [file.name for file in (run / "deepspeed_shm_comm").iterdir()] == ["deepspeed_shm_comm.so"]


@pytest.mark.slow
def test_the_op_is_linked_with_a_torch_whose_path_has_a_space(tmp_path, monkeypatch):
    """A virtual environment in a folder with a space: the linker gets torch's folder as one word."""
    import torch

    libraries = tmp_path / "a copy"
    libraries.symlink_to(Path(torch.__file__).with_name("lib"))
    elsewhere = f"from torch.utils import cpp_extension\ncpp_extension.TORCH_LIB_PATH = {str(libraries)!r}\n"
    monkeypatch.setattr(deepspeed_ops, "_BUILD", elsewhere + deepspeed_ops._BUILD)
    deepspeed_ops.place_ops(tmp_path / "run", cache=tmp_path / "cache")
    assert "a copy'" in (tmp_path / "run" / "deepspeed_shm_comm" / "build.ninja").read_text()
    assert (tmp_path / "run" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").is_file()
