"""Questions of every form, and how the answers to them are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.data.document_formats import BadDocumentError
from train.errors import UserError
from train.evaluate import squad
from train.evaluate.exact_match import is_match, normalise
from train.evaluate.questions import Question, parse, read
from train.finetune.record_formats import Reading

READING = Reading("### Human:", "### Assistant:")

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome is old.",
                    "qas": [
                        {"id": "a", "question": "What is old?", "answers": [{"text": "Rome", "answer_start": 0}] * 2},
                        {"id": "b", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_squads_own_file(tmp_path: Path) -> None:
    file = tmp_path / "dev.json"
    file.write_text(json.dumps(SQUAD, indent=1))
    found = read(file, READING, flag="--squad_files")
    assert [(one.identity, one.answers) for one in found] == [("a", ("Rome",)), ("b", ("",))]
    assert [one.record["context"] for one in found] == ["Rome is old."] * 2
    assert found[1].place == f"--squad_files {file}, the whole file, article 1, paragraph 1, question 2"
    assert len(read(file, READING, flag="--squad_files", limit=1)) == 1


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"question": "q", "answer": "a"}, ("a",)),
        ({"question": "q", "answers": ["a", "b", "a"]}, ("a", "b")),
        ({"question": "q", "context": "c", "answers": {"text": ["a"]}, "answer": "b"}, ("a",)),
        ({"question": "q", "answers": {"text": []}}, ("",)),
        ({"prompt": "p", "completion": "a"}, ("a",)),
        ({"prompt": "p", "answers": ["a", "b"]}, ("a", "b")),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": "a"}, ("a",)),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "a"}]}, ("a",)),
        ({"instruction": "i", "input": "n", "output": "a"}, ("a",)),
        ({"instruction": "i", "input": None, "response": "a"}, ("a",)),
        ({"instruction": "i", "output": " ", "answers": [{"text": "a"}]}, ("a",)),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ("a",)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("a",)),
        ({"text": "### Human: q### Assistant: a"}, ("a",)),
    ],
)  # fmt: skip
def test_right_answers_of_each_form(record: dict[str, Any], answers: tuple[str, ...]) -> None:
    question = parse(record, READING, number=7)
    assert (question.identity, question.answers, question.record) == ("7", answers, record)
    assert parse(record | {"id": 3}, READING, number=7).identity == "3"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "not an object"),
        ({"body": "x"}, "no question and answer"),
        ({"question": "x"}, "no question and answer"),
        ({"question": " ", "answer": "x"}, "message 1, by user, is empty"),
        ({"question": "q", "answer": 5}, "its answer is no text"),
        ({"question": "q", "answers": [1]}, "its answer is no text"),
        ({"prompt": [{"role": "assistant", "content": "q"}], "answer": "x"}, "does not end with a message by the user"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"messages": "q"}, "'messages' is not a list of messages"),
        ({"text": "q"}, "its text has no '### Human:'; name the right --instruction_template"),
    ],
)
def test_what_is_no_question(record: Any, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse(record, READING, number=1)


def test_a_form_can_be_forced() -> None:
    record = {"prompt": "p", "answer": "a", "text": "no conversation"}
    with pytest.raises(BadDocumentError, match="its text has no"):
        parse(record, READING, number=1)
    assert parse(record, Reading("", "", data_format="prompt_completion"), number=1).answers == ("a",)
    with pytest.raises(BadDocumentError, match="of the form squad, which --data_format forces"):
        parse(record, Reading("", "", data_format="squad"), number=1)


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    with pytest.raises(UserError, match="is not a file"):
        read(file, READING, flag="--question_files")
    file.write_text("{\n" * 13 + '{"question": "q", "answer": "a"}\n')
    with pytest.raises(UserError) as caught:
        read(file, READING, flag="--question_files")
    assert len(caught.value.problems) == 11
    assert "line 1: broken JSON" in caught.value.problems[0]
    assert caught.value.problems[-1] == "3 more records are no questions."
    file.write_text('{"id": 1, "question": "q", "answer": "a"}\n' * 2)
    with pytest.raises(UserError, match="has the id '1' 2 times"):
        read(file, READING, flag="--question_files")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read(file, READING, flag="--question_files")


def test_exact_match() -> None:
    assert is_match(" a  b\n", ["x", "a b"], "blanks") and not is_match("A b", ["a b"], "blanks")
    assert is_match("Ａ Ｂ１", ["a b1"], "nfkc") and not is_match("a.", ["a"], "nfkc")
    assert is_match("a", ["a"], "none") and not is_match("a ", ["a"], "none")
    assert normalise("Ｃａｔ　ｓ", "nfkc") == "cat s"


def test_squads_scores_by_hand() -> None:
    """Precision 2/3 and recall 1 give F1 0.8; the best of several answers counts; no answer is answered by none."""
    questions = [
        Question("a", ("Paris cat",)),
        Question("b", ("wrong", "The Eiffel-Tower!")),
        Question("c", ("",)),
        Question("d", ("",)),
        Question("e", ("猫は犬を見る",)),
    ]
    whole, each = squad.scores(questions, ["the cat in Paris", "eiffeltower", "", "something", "猫は犬"])
    assert [one["exact_match"] for one in each] == [0, 100, 100, 0, 0]
    assert [one["f1"] for one in each] == pytest.approx([80, 100, 100, 0, 0])
    assert whole == {"exact_match": pytest.approx(40), "f1": pytest.approx(56)}
