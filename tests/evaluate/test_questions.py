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
    assert read(file, flag="--squad_files") == [
        Question("a", "What is old?", ("Rome",), "Rome is old.", "Rome"),
        Question("b", "Who?", ("",), "Rome is old.", "Rome"),
    ]
    assert len(read(file, flag="--squad_files", limit=1)) == 1


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"question": "q", "answer": "a"}, Question("7", "q", ("a",))),
        ({"id": 3, "question": "q", "answers": ["a", "b", "a"]}, Question("3", "q", ("a", "b"))),
        ({"question": "q", "context": "c", "answers": {"text": ["a"]}}, Question("7", "q", ("a",), "c")),
        ({"prompt": "p", "completion": "a"}, Question("7", "p", ("a",))),
        ({"instruction": "i", "input": "n", "output": "a"}, Question("7", "i", ("a",), "n")),
        ({"instruction": "i", "input": None, "output": "a"}, Question("7", "i", ("a",))),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            Question("7", "q", ("a",), messages=({"role": "user", "content": "q"},)),
        ),
    ],
)  # fmt: skip
def test_forms(record: dict[str, Any], question: Question) -> None:
    assert parse(record, number=7) == question


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "not an object"),
        ({"text": "x"}, "no question and answer"),
        ({"question": "x"}, "no question and answer"),
        ({"question": " ", "answer": "x"}, "'question' is blank"),
        ({"question": "q", "answer": 5}, "'answer' is no text"),
        ({"question": "q", "answers": [1]}, "'answers' is no text"),
        ({"messages": [{"role": "user", "content": "q"}]}, "ends with a question and an answer"),
        ({"messages": "q"}, "ends with a question and an answer"),
    ],
)
def test_what_is_no_question(record: Any, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse(record, number=1)


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "qa.jsonl"
    with pytest.raises(UserError, match="is not a file"):
        read(file, flag="--question_files")
    file.write_text("{\n" * 13 + '{"question": "q", "answer": "a"}\n')
    with pytest.raises(UserError) as caught:
        read(file, flag="--question_files")
    assert len(caught.value.problems) == 11
    assert "line 1: broken JSON" in caught.value.problems[0]
    assert caught.value.problems[-1] == "3 more records are no questions."
    file.write_text('{"id": 1, "question": "q", "answer": "a"}\n' * 2)
    with pytest.raises(UserError, match="has the id '1' 2 times"):
        read(file, flag="--question_files")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read(file, flag="--question_files")


def test_what_the_model_is_asked() -> None:
    question = Question("1", "Who {context}?", ("x",), "It was {question}.", "T")
    raw = "{title}: {context}\n\nQ: {question}\nA:"
    assert (
        question.prompt(None, raw).text == "T: It was {question}.\n\nQ: Who {context}?\nA:"
    )  # braces of the data stay
    assert question.prompt(None, None).text == "It was {question}.\n\nWho {context}?"
    assert question.prompt("{{ messages }}", raw).turns() == [
        {"role": "user", "content": "It was {question}.\n\nWho {context}?"}
    ]
    knows_input = "{% for message in messages %}{{ message['input'] }}{% endfor %}"
    assert question.prompt(knows_input, raw).turns() == [
        {"role": "user", "content": "Who {context}?", "input": "It was {question}."}
    ]
    turns = tuple({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))
    talk = Question("1", "c", ("x",), messages=turns)
    assert talk.prompt("{{ messages }}", raw).turns() == list(turns)
    assert talk.prompt(None, raw).turns() == [{"role": "user", "content": "a\nb\nc"}]
    bare = Question("1", "Who?", ("x",))
    assert bare.prompt(None, raw).text == bare.prompt("{{ messages }}", raw).text == "Who?"


def test_exact_match() -> None:
    assert is_match(" a  b\n", ["x", "a b"], "blanks") and not is_match("A b", ["a b"], "blanks")
    assert is_match("Ａ Ｂ１", ["a b1"], "nfkc") and not is_match("a.", ["a"], "nfkc")
    assert is_match("a", ["a"], "none") and not is_match("a ", ["a"], "none")
    assert normalise("Ｃａｔ　ｓ", "nfkc") == "cat s"


def test_squads_scores_by_hand() -> None:
    """Precision 2/3 and recall 1 give F1 0.8; the best of several answers counts; no answer is answered by none."""
    questions = [
        Question("a", "?", ("Paris cat",)),
        Question("b", "?", ("wrong", "The Eiffel-Tower!")),
        Question("c", "?", ("",)),
        Question("d", "?", ("",)),
        Question("e", "?", ("猫は犬を見る",)),
    ]
    whole, each = squad.scores(questions, ["the cat in Paris", "eiffeltower", "", "something", "猫は犬"])
    assert [one["exact_match"] for one in each] == [0, 100, 100, 0, 0]
    assert [one["f1"] for one in each] == pytest.approx([80, 100, 100, 0, 0])
    assert whole == {"exact_match": pytest.approx(40), "f1": pytest.approx(56)}


def test_a_context_stands_where_finetuning_put_it(bytes_: Any) -> None:
    """The ids of the prompt are those of the prompt template, filled in by hand."""
    from train.finetune.generate import prompt_ids
    from train.finetune.prompt_template import PromptTemplate, find

    question = Question("1", "Who?", ("x",), "It was Rome.")
    template = PromptTemplate.parse(*find("squad")).chat_template()
    bytes_.chat_template = template
    try:
        given = prompt_ids(bytes_, question.prompt(template, None), raw=False)
    finally:
        bytes_.chat_template = None
    assert bytes_.decode(given) == "It was Rome.\n\nQ: Who?\nA:"
