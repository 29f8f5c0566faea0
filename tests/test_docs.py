"""What the documents say holds: every command runs as written, every link leads somewhere, both languages agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.engine.megatron_deepspeed.checkout import find_checkout
from train.engine.megatron_deepspeed.patches import all_patches

ROOT = Path(__file__).resolve().parent.parent
# In the order in which a reader goes through them: a page uses what the page before it made.
CHAINS = [
    ["README.md", "CONTRIBUTING.md"],
    [
        "docs/step1_train_tokenizer.md",
        "docs/step2_preprocess.md",
        "docs/plan.md",
        "docs/step2_pretrain_model.md",
        "docs/step3_upload_pretrained_model.md",
        "docs/step4_finetune_model.md",
        "docs/finetuning_data.md",
        "docs/evaluate.md",
        "docs/report.md",
        "docs/profile.md",
        "docs/step5_upload_finetuned_model.md",
        "docs/megatron_deepspeed.md",
    ],
    ["docs/clusters.md", "docs/cluster_nodes.md", "docs/measure_nodes.md", "docs/submit.md"],
]
# Blocks that are not run here, and where they are run instead.
ELSEWHERE = {
    "make demo": "tests/test_demo.py runs the demo",
    "make test-optional": "it installs packages; .ci/run calls it",
    "make test-gpu": "it needs GPUs",
    "make test-system": "it makes clusters on the machine; .ci/run calls it",
    "make test": "this is what is running",
    "bash scripts/common/install_megatron_deepspeed.sh": "it needs a network; tests/engine installs from a local clone",
    "make install": "the tests stand on what it installed; make lint and make test-fast are parts of make test",
}
NEEDS_MEGATRON = "--engine megatron-deepspeed"  # left out when no checkout is installed
ALL_DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(document: Path) -> list[str]:
    """The shell blocks of a document."""
    return re.findall(r"^```sh\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_run_elsewhere(block: str) -> bool:
    return any(block.startswith(command) for command in ELSEWHERE)


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Path:
    """The tracked files in a folder with a space in its name, with this environment as its .venv."""
    copy = tmp_path / "a copy"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("pages", CHAINS, ids=lambda pages: pages[0])
def test_every_command_runs_as_written(pages, fresh_copy):
    """Page after page in one copy, as a reader goes through them."""
    checkout = find_checkout()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(fresh_copy)}  # the copy's own train/, not the one this environment was made for
    environment |= {"MEGATRON_DEEPSPEED_DIR": str(checkout.path)} if checkout else {}
    environment.pop("TRAIN_PYTHON", None)
    for page in pages:
        for block in blocks(ROOT / page):
            if is_run_elsewhere(block) or (checkout is None and NEEDS_MEGATRON in block):
                continue
            done = subprocess.run(
                ["bash", "-c", "set -euo pipefail\n" + block], cwd=fresh_copy, env=environment,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page}:\n{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_all_pages_with_commands_are_run():
    with_commands = {str(file.relative_to(ROOT)) for file in ALL_DOCUMENTS if blocks(file)}
    assert with_commands - {page for pages in CHAINS for page in pages} == {"README.ja.md"}, (
        "its commands are those of README.md: see below"
    )


@pytest.mark.parametrize("document", ALL_DOCUMENTS, ids=lambda file: file.name)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_patches_are_listed_in_the_order_in_which_they_are_applied():
    text = (ROOT / "docs" / "megatron_deepspeed.md").read_text(encoding="utf-8").partition("## Patches")[2]
    listed = re.findall(r"^\| `([\w-]+)` \|", text.partition("\n## ")[0], re.MULTILINE)
    assert listed == [patch.name for patch in all_patches()]


def test_both_readmes_say_the_same():
    english, japanese = ROOT / "README.md", ROOT / "README.ja.md"
    assert [without_comments(block) for block in blocks(english)] == [
        without_comments(block) for block in blocks(japanese)
    ]
    count = [len(re.findall(r"^##? ", file.read_text(encoding="utf-8"), re.MULTILINE)) for file in (english, japanese)]
    assert count[0] == count[1], "the same sections"
    links = [
        sorted(set(re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")))) for file in (english, japanese)
    ]
    assert [link for link in links[0] if "README" not in link] == [link for link in links[1] if "README" not in link]
    rows = [len(re.findall(r"^\|", file.read_text(encoding="utf-8"), re.MULTILINE)) for file in (english, japanese)]
    assert rows[0] == rows[1], "the same tables"


def without_comments(block: str) -> str:
    return "\n".join(line for line in block.splitlines() if not line.startswith("#"))


def test_every_flag_that_a_page_names_exists():
    """A flag in prose that no launcher has is a promise nobody keeps."""
    known = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("train", "scripts", "benchmarks")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sh")
    )
    foreign = {"--append-eod", "--tokenizer-type", "--flag", "--FLAG", "--repository"}
    for document in ALL_DOCUMENTS:
        for flag in set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", document.read_text(encoding="utf-8"))) - foreign:
            name = flag[2:]
            assert re.search(rf"\b{name}\b", known), f"{document.name} names {flag}"
