"""An output appears whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import outputs
from train.errors import UserError


def test_a_file_appears_when_the_block_ends(awkward_path):
    with outputs.new_file(awkward_path / "a") as unfinished:
        unfinished.write_text("x")
        assert not (awkward_path / "a").exists()
    assert (awkward_path / "a").read_text() == "x"
    assert [file.name for file in awkward_path.iterdir()] == ["a"]


def test_nothing_is_left_when_the_block_fails(tmp_path):
    with pytest.raises(ValueError), outputs.new_file(tmp_path / "a") as unfinished:
        unfinished.write_text("half")
        raise ValueError
    with pytest.raises(ValueError), outputs.new_folder(tmp_path / "b") as folder:
        (folder / "half").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_without_overwrite(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").write_text("old")
    with pytest.raises(UserError, match="exists already: pass --overwrite"), outputs.new_file(tmp_path / "a"):
        pass
    with pytest.raises(UserError, match="exists already: pass --overwrite"), outputs.new_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_an_old_folder_goes_only_when_the_new_one_is_whole(tmp_path):
    target = tmp_path / "b"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(ValueError), outputs.new_folder(target, overwrite=True):
        raise ValueError
    assert (target / "manifest.json").read_text() == "old"
    with outputs.new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["new"]


def test_overwrite_is_for_our_outputs_only(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="was not made by this step"),
        outputs.new_folder(tmp_path / "mine", overwrite=True),
    ):
        pass
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("given", ["model", "model/global_step1", "link"])
def test_an_output_never_takes_the_place_of_its_input(tmp_path, given):
    (tmp_path / "model" / "global_step1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UserError, match=r"model holds the input .*: choose another output"):
        outputs.refuse_inputs(tmp_path / "model", [tmp_path / given])
    outputs.refuse_inputs(tmp_path / "model" / "new", [tmp_path / given, tmp_path / "absent"])


def test_an_empty_folder_is_no_output(tmp_path):
    (tmp_path / "b").mkdir()
    with outputs.new_folder(tmp_path / "b") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "b" / "new").exists()


def test_file_and_folder_are_not_mistaken_for_each_other(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder, a file name was expected"), outputs.new_file(tmp_path):
        pass
    with pytest.raises(UserError, match="is a file, a folder name"), outputs.new_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="is a file, a folder was expected"), outputs.new_file(tmp_path / "file" / "x"):
        pass


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from train import outputs\n"
        "with outputs.new_folder(Path(sys.argv[1])) as f:\n"
        "    (f / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], check=False)
    assert len(list(tmp_path.iterdir())) == 1, "the killed run leaves its temporary folder"
    with outputs.new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_another_running_process_keeps_its_unfinished_output(tmp_path):
    own = outputs._unfinished_name(tmp_path / "b")
    other = own.with_name(own.name.rpartition("-")[0] + f"-{os.getppid()}")
    other.mkdir()
    with outputs.new_folder(tmp_path / "b"):
        pass
    assert other.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="is not writable"), outputs.new_file(tmp_path / "a"):
        pass


def test_a_folder_that_cannot_be_made_is_named():
    from pathlib import Path

    with pytest.raises(UserError, match="cannot be made"), outputs.new_file(Path("/proc/no/such/file")):
        pass


def test_weights_in_a_new_folder_are_readable_as_any_new_file(tmp_path: Path) -> None:
    with outputs.new_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").touch(mode=0o600)
        (folder / "usual").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1
