"""A git repository in the form of upstream's: enough to be cloned and compiled, nothing to import."""

from __future__ import annotations

import subprocess
from pathlib import Path

HELPERS = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "helpers", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_helpers(void) { return PyModule_Create(&module); }
"""


def git(folder: Path, *words: str) -> str:
    """Runs git in a folder and returns what it says."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """Two commits, and the tag `v1` on the first."""
    (folder / "megatron" / "data").mkdir(parents=True)
    (folder / "pretrain_gpt.py").write_text("")
    (folder / "megatron" / "training.py").write_text("")
    (folder / "megatron" / "data" / "helpers.cpp").write_text(HELPERS)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    git(folder, "tag", "v1")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "two")
    return folder
