"""The streaming writer of safetensors: what it writes is what safetensors and transformers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoint.safetensors_folder import SafetensorsFolder
from train.checkpoint.shard_writer import spec_of, write_shards
from train.errors import UserError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5).to(torch.bfloat16),  # 30 bytes: what follows must still be aligned
        "b": torch.randn(4),
        "c": torch.randn(2, 2, 2).to(torch.float16),
        "d": torch.empty(0, 3),
    }


def write(folder: Path, given: dict[str, torch.Tensor], **options: int) -> None:
    write_shards(folder, [spec_of(name, t.shape, t.dtype) for name, t in given.items()], given.__getitem__, **options)


def test_one_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    given = tensors()
    write(tmp_path, given)
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(given) and all(torch.equal(read[name], given[name]) for name in given)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_its_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    given = {"only": torch.randn(8, 3)}
    write(tmp_path, given)
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours[-96:] == theirs[-96:] and len(ours) == len(theirs)


def test_shards_and_their_index(tmp_path: Path) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    given = {f"t{number}": torch.full((20,), float(number)) for number in range(3)}
    write(tmp_path, given, shard_bytes=100)
    files, _ = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / "model.safetensors.index.json"))
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 3 and all(torch.equal(merged[name], given[name]) for name in given)
    folder = SafetensorsFolder(tmp_path)
    assert folder.shape("t2") == (20,) and torch.equal(folder.read("t2"), given["t2"])


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {f"t{number}": torch.ones(20) for number in range(3)}, shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    placed["weight_map"]["t1"] = placed["weight_map"]["t0"]
    index.write_text(json.dumps(placed))
    with pytest.raises(UserError, match="lacks t1, which model"):
        SafetensorsFolder(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="is not an index of safetensors"):
        SafetensorsFolder(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing: a model's weights"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="truncated or damaged"):
        SafetensorsFolder(tmp_path)
