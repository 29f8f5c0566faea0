"""Secrets: from the environment or a file of the owner's alone, told by no message."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.cluster import secrets
from train.errors import UserError


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file = folder / "secrets"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    file.chmod(mode)
    return file


def test_lines_comments_export_and_quotes(tmp_path):
    file = written(
        tmp_path,
        "# mine\n\nWANDB_API_KEY=abc\nexport HF_TOKEN='d e'\n  A_1=  \n"
        + 'DOUBLE="x=y"\nINNER="it\'s"\nOPEN=\'half\nTAIL=pass"\nBOTH="\'\nTWO="a"b"\nHASH=a#b\n',
    )
    assert secrets.read(file) == {
        "WANDB_API_KEY": "abc",
        "HF_TOKEN": "d e",
        "A_1": "",
        "DOUBLE": "x=y",
        "INNER": "it's",
        "OPEN": "'half",
        "TAIL": 'pass"',
        "BOTH": "\"'",
        "TWO": '"a"b"',
        "HASH": "a#b",
    }


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    with pytest.raises(UserError, match="can be read by others: chmod 600 it"):
        secrets.read(written(tmp_path, "A=planted\n", mode))


def test_all_bad_lines_are_told_by_number_and_none_is_repeated(tmp_path):
    file = written(tmp_path, "A=1\nplanted one\n1B=planted\n=planted\nC=2\nD =planted\n")
    with pytest.raises(UserError) as caught:
        secrets.read(file)
    assert [problem.partition(", ")[2] for problem in caught.value.problems] == [
        f"line {number}: NAME=VALUE was expected." for number in (2, 3, 4, 6)
    ]
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_what_is_no_text_file_is_refused(tmp_path, kind):
    file = tmp_path / "no" if kind == "missing" else tmp_path
    if kind == "binary":
        file = written(tmp_path, b"A=\xff\xfeplanted")
    with pytest.raises(UserError, match=r"cannot be read .*: name a text file") as caught:
        secrets.read(file)
    assert "planted" not in str(caught.value) and caught.value.__suppress_context__


def test_the_environments_secrets_are_those_of_the_libraries_and_the_file_wins(tmp_path):
    environment = {"WANDB_API_KEY": "w", "HF_TOKEN": "h", "MY_TOKEN": "m", "HUGGING_FACE_HUB_TOKEN": ""}
    assert secrets.collect(environment, None) == {"WANDB_API_KEY": "w", "HF_TOKEN": "h"}
    file = written(tmp_path, "HF_TOKEN=file\nMY_TOKEN=file\n")
    assert secrets.collect(environment, file) == {"WANDB_API_KEY": "w", "HF_TOKEN": "file", "MY_TOKEN": "file"}


def test_a_proxy_with_a_password_is_a_secret_and_one_without_is_not():
    environment = {"http_proxy": "http://me:planted@proxy:3128", "https_proxy": "http://proxy:3128"}
    assert secrets.collect(environment, None) == {"http_proxy": "http://me:planted@proxy:3128"}
