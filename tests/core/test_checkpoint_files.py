"""A changed byte in a checkpoint is found, wherever it is."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest

from train import checkpoint_files

NAMES = ("whole", "inner/other", "empty")


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "global_step4"
    (folder / "inner").mkdir(parents=True)
    for name, size in zip(NAMES, (5000, 300, 0), strict=True):
        (folder / name).write_bytes(random.Random(size).randbytes(size))
    checkpoint_files.record(folder)
    return folder


def problems(folder: Path, *, contents: bool = True) -> list[str]:
    return sorted(checkpoint_files.damage(folder, contents=contents))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_an_untouched_checkpoint_has_no_damage(step_dir: Path) -> None:
    assert problems(step_dir) == problems(step_dir, contents=False) == []
    recorded = checkpoint_files.recorded(step_dir)
    assert recorded is not None and recorded["whole"] == (5000, f"{zlib.crc32((step_dir / 'whole').read_bytes()):08x}")


def test_missing_and_truncated_files_are_found_by_a_glance(step_dir: Path) -> None:
    (step_dir / "whole").write_bytes((step_dir / "whole").read_bytes()[:-1])
    (step_dir / "inner" / "other").unlink()
    expected = ["inner/other: missing", "whole: 4,999 bytes, 5,000 were written"]
    assert problems(step_dir, contents=False) == expected == problems(step_dir)


@pytest.mark.parametrize("seed", range(60))
def test_one_flipped_bit_is_found_every_time(step_dir: Path, seed: int) -> None:
    name = random.Random(seed).choice(NAMES[:2])
    flip(step_dir / name, random.Random(seed).randrange((step_dir / name).stat().st_size * 8))
    assert problems(step_dir, contents=False) == []
    (problem,) = problems(step_dir)
    assert problem.startswith(f"{name}: other contents than were written (CRC-32 ")


def test_one_flipped_bit_in_the_list_itself_is_found_every_time(step_dir: Path) -> None:
    file = step_dir / checkpoint_files.FILES
    for bit in range(file.stat().st_size * 8):
        before = json.loads(file.read_text())
        flip(file, bit)
        assert problems(step_dir), (bit, file.read_bytes())
        flip(file, bit)
        assert json.loads(file.read_text()) == before


def test_swapped_files_are_found(step_dir: Path) -> None:
    (step_dir / "inner" / "other").write_bytes(random.Random(1).randbytes(5000))
    checkpoint_files.record(step_dir)
    (step_dir / "whole").rename(step_dir / "kept")
    (step_dir / "inner" / "other").rename(step_dir / "whole")
    (step_dir / "kept").rename(step_dir / "inner" / "other")
    assert [problem.partition(":")[0] for problem in problems(step_dir)] == ["inner/other", "whole"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"whole": {"bytes": 5000}}', '{"whole": {"crc32": "0"}}', "\xff"]
)
def test_a_list_that_says_nothing_is_damage(step_dir: Path, text: str) -> None:
    (step_dir / checkpoint_files.FILES).write_text(text, encoding="latin-1")
    assert problems(step_dir) == ["files.json: missing or damaged"]


def test_a_list_of_before_there_were_checksums_is_read(step_dir: Path) -> None:
    (step_dir / checkpoint_files.FILES).write_text('{"whole": 5000, "empty": 1}')
    assert problems(step_dir) == ["empty: 0 bytes, 1 were written"]


def test_sums_that_other_ranks_took_are_written_down_and_not_taken_again(step_dir: Path) -> None:
    checkpoint_files.record(step_dir, {"whole": "00000000", "not here": "11111111"})
    recorded = checkpoint_files.recorded(step_dir)
    assert recorded is not None and recorded["whole"][1] == "00000000" and "not here" not in recorded
    assert [problem.partition(":")[0] for problem in problems(step_dir)] == ["whole"]
