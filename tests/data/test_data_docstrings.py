from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.data import docstrings
from train.data.docstrings import docstring_documents
from train.data.sample_conversations import docstring_conversations, split_held_out, summary_sentence
from train.errors import UserError

SCRIPT = "common/make_sample_data.py"


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(docstring_documents())


@pytest.fixture(scope="module")
def conversations() -> list[dict[str, Any]]:
    return list(docstring_conversations())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that must not be imported."""
    folder = tmp_path / "sample_package"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A package whose import would fail the test."""\nraise SystemExit("ran")\n')
    (folder / "tests" / "hidden.py").write_text('"""Tests are left out, whatever their docstrings say."""\n')
    (folder / "broken.py").write_text("def (:\n")
    (folder / "odd.py").write_text('"""A lone surrogate: \\ud800, which no text file can hold."""\n')
    (folder / "work.py").write_text(
        '"""Does the work of the package."""\n'
        "def carry(load: int, *, far=1) -> None:\n"
        '    """Carry the load to its place. Then rest.\n\n    Far.\n    """\n'
        "async def wait(): 'Wait until the load is there.'\n"
        "class Box(list):\n"
        '    """Hold what is carried."""\n'
        '    def open(self):\n        """Open the box and look inside."""\n'
        '    def _private(self):\n        """Never seen by anybody."""\n'
        "def silent(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_standard_library_gives_real_text(documents: list[dict[str, Any]]) -> None:
    modules = [document["module"] for document in documents]
    assert {"os.path", "json", "json.decoder", "argparse"} <= set(modules)
    assert not {"ntpath", "posixpath"} & set(modules)
    assert not [name for name in modules if ".test" in name or name.startswith(("idlelib", "lib2to3"))]
    assert modules == sorted(modules)
    assert len(documents) > 300
    assert sum(len(document["text"]) for document in documents) > 1_000_000
    assert len({document["text"] for document in documents}) == len(documents)
    join = next(document["text"] for document in documents if document["module"] == "os.path")
    assert "def join(a, *p)\nJoin two or more pathname components" in join
    for document in documents:
        document["text"].encode("utf-8")


def test_documents_are_the_same_every_time(documents: list[dict[str, Any]]) -> None:
    docstrings._folder_entries.cache_clear()
    assert list(docstring_documents()) == documents


def test_packages_are_read_and_never_run(package: Path, documents: list[dict[str, Any]]) -> None:
    added = list(docstring_documents(["sample_package"]))[len(documents) :]
    assert {document["module"]: document["text"] for document in added} == {
        "sample_package.work": "sample_package.work\n\nDoes the work of the package.\n\n"
        "def carry(load: int, *, far=1)\nCarry the load to its place. Then rest.\n\nFar.\n\n"
        "async def wait()\nWait until the load is there.\n\n"
        "class Box(list)\nHold what is carried.\n\n"
        "def open(self)\nOpen the box and look inside."
    }


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder", "sys"])
def test_what_is_no_package(name: str) -> None:
    with pytest.raises(UserError, match="is not an installed package with Python sources"):
        list(docstring_documents([name]))


def test_conversations_are_unique_questions_with_sentences(conversations: list[dict[str, Any]]) -> None:
    assert len(conversations) > 2000
    questions = [conversation["messages"][0]["content"] for conversation in conversations]
    answers = [conversation["messages"][1]["content"] for conversation in conversations]
    assert len(set(questions)) == len(questions)
    assert len(set(answers)) == len(answers)
    assert all(answer[-1] in ".!" and "\n" not in answer for answer in answers)
    assert all([message["role"] for message in entry["messages"]] == ["user", "assistant"] for entry in conversations)
    found = next(entry for entry in conversations if entry["name"] == "os.path.join")
    assert "`os.path.join`" in found["messages"][0]["content"]
    assert found["messages"][1]["content"] == "Join two or more pathname components, inserting '/' as needed."


def test_package_conversations(package: Path, conversations: list[dict[str, Any]]) -> None:
    added = list(docstring_conversations(["sample_package"]))[len(conversations) :]
    assert {entry["name"]: entry["messages"][1]["content"] for entry in added} == {
        "sample_package": "A package whose import would fail the test.",
        "sample_package.work": "Does the work of the package.",
        "sample_package.work.carry": "Carry the load to its place.",
        "sample_package.work.wait": "Wait until the load is there.",
        "sample_package.work.Box": "Hold what is carried.",
        "sample_package.work.Box.open": "Open the box and look inside.",
    }


def test_the_held_out_part_is_small_separate_and_fixed(conversations: list[dict[str, Any]]) -> None:
    trained, held_out = split_held_out(conversations)
    assert 0.03 < len(held_out) / len(conversations) < 0.07
    assert not {entry["name"] for entry in trained} & {entry["name"] for entry in held_out}
    assert len(trained) + len(held_out) == len(conversations)
    _, of_fewer = split_held_out(conversations[: len(conversations) // 2])
    assert of_fewer == held_out[: len(of_fewer)]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the answer. More follows.", "Return the answer."),
        ("Return\n   the answer.\n\nMore.", "Return the answer."),
        ("Parse e.g. this file. Then stop.", "Parse e.g. this file."),
        ("Too short.", None),
        ("No end to this sentence", None),
        ("join(a, b) -> string of both.", None),
        (">>> this is an example.", None),
        ("An example >>> stands here.", None),
        ("", None),
        ("A " + "very " * 60 + "long sentence.", None),
    ],
)
def test_summary_sentence(docstring: str, expected: str | None) -> None:
    assert summary_sentence(docstring) == expected


def test_launcher(awkward_path: Path, launch: Any) -> None:
    folder = awkward_path / "sample"
    dry = launch(SCRIPT, "--output_dir", folder, "--dry_run")
    assert dry.returncode == 0 and not folder.exists(), dry.stderr
    done = launch(SCRIPT, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "manifest.json").read_text())["results"]
    for name in ("documents", "conversations", "held_out_conversations"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len([json.loads(line) for line in lines]) == results[name] > 0
    assert "nothing to do" in launch(SCRIPT, "--output_dir", folder).stdout
    other = launch(SCRIPT, "--output_dir", folder, "--packages", "yaml")
    assert other.returncode == 2 and "--overwrite" in other.stderr
    assert launch(SCRIPT, "--output_dir", folder, "--packages", "yaml", "--overwrite").returncode == 0
    assert json.loads((folder / "manifest.json").read_text())["results"]["documents"] > results["documents"]


def test_launcher_refuses_what_is_no_package(tmp_path: Path, launch: Any) -> None:
    done = launch(SCRIPT, "--output_dir", tmp_path / "s", "--packages", "a.b,no-name")
    assert done.returncode == 2
    assert "'a.b' is not a top-level package name" in done.stderr and "'no-name'" in done.stderr
    done = launch(SCRIPT, "--output_dir", tmp_path / "s", "--packages", "no_such_package")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []
