"""From which checkpoint a run goes on: the newest that is whole on every node; the damaged ones are set aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from train import checkpoint_files, resume
from train.errors import UserError
from train.resume import Decision, NodeView

POINTERS = {"latest": "global_step8", "latest_checkpointed_iteration.txt": "8"}
WHOLE: tuple[str, ...] = ()


def view(node: str = "a", pointers: dict[str, str] | None = None, **steps: tuple[str, ...]) -> NodeView:
    """`view(s4=(), s8=("file: missing",))`."""
    named = POINTERS if pointers is None else pointers
    return NodeView(node, {int(name[1:]): problems for name, problems in steps.items()}, named)


def test_a_new_run_begins_at_the_beginning_and_says_nothing() -> None:
    assert resume.decide([view(pointers={})]) == Decision(None)


def test_the_newest_whole_step_is_taken_without_a_word() -> None:
    assert resume.decide([view(s4=WHOLE, s8=WHOLE)]) == Decision(8)
    assert resume.decide([view("a", s4=WHOLE, s8=WHOLE), view("b", s8=WHOLE)]) == Decision(8)


def test_a_damaged_step_is_stepped_over_and_told() -> None:
    decision = resume.decide([view(s2=WHOLE, s4=WHOLE, s8=("x.pt: missing", "y.pt: 3 bytes, 5 were written"))])
    assert (decision.step, decision.aside) == (4, (8,))
    assert decision.report == (
        "global_step8 is damaged (x.pt: missing and 1 more): set aside",
        "latest names 'global_step8'",
        "latest_checkpointed_iteration.txt names '8'",
        "going on from global_step4, the newest checkpoint that is whole",
    )


def test_an_older_damaged_step_stays_where_it_is() -> None:
    assert resume.decide([view(s4=("x.pt: missing",), s8=WHOLE)]) == Decision(8)


@pytest.mark.parametrize("latest", ["global_step4", "global_step12", "", "nonsense"])
def test_pointers_that_disagree_are_told_and_the_folders_decide(latest: str) -> None:
    decision = resume.decide([view(pointers={**POINTERS, "latest": latest}, s4=WHOLE, s8=WHOLE)])
    assert decision.step == 8 and decision.aside == ()
    assert decision.report[0] == f"latest names {latest!r}" and len(decision.report) == 2


def test_nodes_that_disagree_meet_at_the_newest_step_that_all_have() -> None:
    behind = {"latest": "global_step4", "latest_checkpointed_iteration.txt": "4"}
    decision = resume.decide(
        [view("a", s4=WHOLE, s8=WHOLE), view("b", behind, s4=WHOLE), view("c", s4=WHOLE, s8=("z",))]
    )
    assert (decision.step, decision.aside) == (4, (8,))
    assert decision.report[:2] == (
        "global_step8 is missing on b: set aside",
        "global_step8 is damaged on c (z): set aside",
    )
    assert "latest on a names 'global_step8'" in decision.report and not any(" b names" in x for x in decision.report)


def test_when_no_step_is_whole_everywhere_nothing_begins_anew() -> None:
    with pytest.raises(UserError) as caught:
        resume.decide([view("a", s4=WHOLE), view("b", s8=WHOLE)])
    assert caught.value.problems[:2] == ("global_step8 is missing on a", "global_step4 is missing on b")
    assert "no checkpoint is whole; nothing was changed." in caught.value.problems[-1]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Two whole checkpoints and both pointers."""
    for step in (4, 8):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(100))
        checkpoint_files.record(folder)
    for name, content in POINTERS.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_changed_byte_is_found_before_a_run_goes_on(job: Path) -> None:
    (job / "global_step8" / "weights").write_bytes(bytes(99) + b"1")
    found = resume.look(job, node="a")
    assert found.steps[4] == () and "other contents" in found.steps[8][0] and found.pointers == POINTERS
    assert resume.look(job, node="a", read_up_to_bytes=10).steps[8] == ()  # of large ones the sizes are compared


def test_what_is_set_aside_stays_and_the_pointers_are_put_right(job: Path) -> None:
    (job / "global_step8" / "weights").unlink()
    decision = resume.decide([resume.look(job, node="a")])
    assert resume.carry_out(decision, job) == [job / "global_step8.damaged"]
    assert (job / "global_step8.damaged" / "files.json").is_file()
    assert (job / "latest").read_text() == "global_step4"
    assert (job / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert resume.decide([resume.look(job, node="a")]) == Decision(4)


def test_a_run_that_was_killed_before_it_wrote_latest_gets_one(job: Path) -> None:
    for name in POINTERS:
        (job / name).unlink()
    assert resume.carry_out(resume.decide([resume.look(job, node="a")]), job) == []
    assert (job / "latest").read_text() == "global_step8"
    assert not (job / "latest_checkpointed_iteration.txt").exists()  # the other engine has none


def test_a_checkpoint_without_a_list_is_not_trusted(job: Path) -> None:
    (job / "global_step8" / "files.json").unlink()
    assert resume.look(job, node="a").steps[8] == ("files.json: missing or damaged",)
