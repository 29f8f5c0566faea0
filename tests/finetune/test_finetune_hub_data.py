"""Data sets of the Hub by name, brought by the real datasets library from a server on this machine, then without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from dataset_server import DatasetServer  # type: ignore[import-not-found]

from train.errors import UserError
from train.finetune import hub_data
from train.process import Command, capture

# The library reads its addresses and folders when it is imported, so each look-up is a process of its own.
CODE = """
import json, sys
from train.errors import UserError
from train.finetune import sources
from train.finetune.record_files import read_records
for word in json.loads(sys.argv[1]):
    try:
        files = sources.find_data([word], flag="--data_files")
        print([record["output"] for file in files for _, record in read_records(file)])
    except UserError as error:
        print(error)
"""


def _find(words: list[str], environment: dict[str, str]) -> list[str]:
    status, told = capture(Command((sys.executable, "-c", CODE, json.dumps(words)), environment), timeout_s=120)
    assert status == 0, told
    return [line for line in told.splitlines() if line.startswith(("[", "--data_files"))]


@pytest.fixture
def server() -> DatasetServer:
    lines = {kind: "".join(json.dumps({"instruction": "Q", "output": f"{kind} {n}"}) + "\n" for n in range(2))
             for kind in ("train", "test")}  # fmt: skip
    return DatasetServer("me/data", {f"{kind}.jsonl": text.encode() for kind, text in lines.items()})


def test_splits_are_found_and_kept_for_where_there_is_no_network(server: DatasetServer, tmp_path: Path) -> None:
    words = ["me/data", "me/data:test", "me/data:default:test", "me/data:none", "me/data:none:train", "me/nothing"]
    with server:
        environment = server.environment(tmp_path)
        train, test, same, no_split, no_configuration, nothing = _find(words, environment)
        assert train == "['train 0', 'train 1']" and test == same == "['test 0', 'test 1']"
        assert "--data_files me/data:none: there is no such file, and no such data set" in no_split
        assert "Should be one of ['train', 'test']" in no_split and "'none' not found" in no_configuration
        assert "doesn't exist on the Hub" in nothing and "name a file" in nothing
    train, test, nothing = _find(["me/data", "me/data:test", "me/nothing"], environment | {"HF_HUB_OFFLINE": "1"})
    assert (train, test) == ("['train 0', 'train 1']", "['test 0', 'test 1']")
    assert "Couldn't reach 'me/nothing' on the Hub" in nothing


def test_what_is_a_name_and_what_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("owner/name", "owner/na-me_1.0", "owner/name:train", "owner/name:en:train"):
        assert hub_data.is_name(word), word
    for word in ("name", "a/b.jsonl", "a/b.json.gz", "a/b/c", "a/*", "./a", "/a/b", "../b", "a/b:c:d:e", "a/b:c/d"):
        assert not hub_data.is_name(word), word
    for word in ("owner/name:train[:100]", "owner/name:train[10%]"):
        with pytest.raises(UserError, match=r"a part of a split is not to be had: name all of it; --eval_size"):
            hub_data.find(word, flag="--data_files")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("x")
    assert not hub_data.is_name("owner/name")
