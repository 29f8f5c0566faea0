"""A manifest tells what made an output, and whether it is the same work again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from train import manifest
from train.errors import UserError


def write(folder: Path, inputs, **settings):
    manifest.write(
        folder / "manifest.json", step="s", settings=settings, inputs=inputs, results={"n": 1}, started=time.time()
    )


def test_the_same_settings_and_inputs_are_done(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("x")
    write(tmp_path, [source], a=(1, 2), place=Path("x"))
    same = {"a": (1, 2), "place": Path("x")}
    assert manifest.is_done(tmp_path, step="s", settings=same, inputs=[source])
    assert not manifest.is_done(tmp_path, step="other", settings=same, inputs=[source])
    assert not manifest.is_done(tmp_path, step="s", settings={**same, "a": (1,)}, inputs=[source])
    assert not manifest.is_done(tmp_path, step="s", settings=same, inputs=[])
    source.write_text("y")
    assert not manifest.is_done(tmp_path, step="s", settings=same, inputs=[source]), "the input has changed"


def test_settings_that_may_differ_are_named_by_their_keys(tmp_path):
    write(tmp_path, [], a=1, part={"b": 1, "c": 1})
    other = {"a": 1, "part": {"b": 2, "c": 1}}
    assert not manifest.is_done(tmp_path, step="s", settings=other, inputs=[])
    assert manifest.is_done(tmp_path, step="s", settings=other, inputs=[], regardless_of={("part", "b")})
    more = {**other, "part": {"b": 2, "c": 2}}
    assert not manifest.is_done(tmp_path, step="s", settings=more, inputs=[], regardless_of={("part", "b")})


def test_without_a_manifest_nothing_is_done(tmp_path):
    assert not manifest.is_done(tmp_path, step="s", settings={}, inputs=[])


def test_it_names_the_software(tmp_path):
    write(tmp_path, [])
    record = manifest.read(tmp_path)
    assert {"python", "train", "torch", "transformers"} <= set(record["software"])
    assert record["results"] == {"n": 1}


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is missing"), ("{", "is not a manifest"), ("[]", "no step, no results")]
)
def test_what_is_no_manifest_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path)


def test_large_inputs_are_told_apart_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_HASHED_UP_TO_BYTES", 3)
    file = tmp_path / "f"
    file.write_text("1234")
    known = manifest.identity(file)
    assert known["bytes"] == 4 and "sha256" not in known and known["modified_ns"] == file.stat().st_mtime_ns
    json.dumps(known)
