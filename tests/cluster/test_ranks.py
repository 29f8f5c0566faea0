from __future__ import annotations

from pathlib import Path

import pytest

from train.cluster import ranks
from train.cluster.allocation import Allocation

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environment(device: str) -> dict[str, str]:
    return ranks.rank_environment(Allocation(("here",), 1, device, ""), extensions_dir=Path("extensions"))


def test_memory_grows_in_every_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    found = environment("cuda")
    assert [found.get(name) for name in NAMES] == ["expandable_segments:True"] * 2
    assert not set(NAMES) & set(environment("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_the_users_own_allocator_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert not set(NAMES) & set(environment("cuda"))
