"""Every form of conversation is read, and everything that is none is refused with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.data.document_formats import BadDocumentError
from train.data.documents import Skipped
from train.errors import UserError
from train.finetune.conversations import Conversation, read_conversations
from train.finetune.record_formats import Message, Reading, parse_record

READING = Reading("### Human:", "### Assistant:")
QUESTION_AND_ANSWER = (Message("user", "Q"), Message("assistant", "A"))


def _read(file: Path, *, on_error: str = "stop", skipped: Skipped | None = None) -> list[Conversation]:
    return list(
        read_conversations([file], READING, on_error=on_error, skipped=Skipped() if skipped is None else skipped)
    )


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"text": "### Human: Q### Assistant: A"},
        {"text": "### Human:\nQ\n\n### Assistant:\n A \n### Human: and now?"},
        {"messages": None, "text": "### Human: Q ### Assistant: A"},
    ],
)
def test_each_form(record: dict[str, Any]) -> None:
    assert parse_record(record, READING)[1] == QUESTION_AND_ANSWER


def test_a_text_of_several_turns_with_what_stands_before() -> None:
    text = "Be brief.\n### Human: Q### Assistant: say '### Assistant:' twice### Human: R### Assistant: B"
    assert parse_record({"text": text}, READING)[1] == (
        Message("system", "Be brief."),
        Message("user", "Q"),
        Message("assistant", "say '### Assistant:' twice"),
        Message("user", "R"),
        Message("assistant", "B"),
    )


def test_templates_with_line_ends_find_texts_that_begin_with_them() -> None:
    text = "### 指示:\nQ\n\n### 応答:\nA"
    reading = Reading("\n\n### 指示:\n", "\n\n### 応答:\n")
    assert parse_record({"text": text}, reading)[1] == QUESTION_AND_ANSWER


def test_messages_keep_their_blanks() -> None:
    messages = [{"role": "user", "content": " Q\n"}, {"role": "assistant", "content": "  A "}]
    assert parse_record({"messages": messages}, READING)[1][1].content == "  A "


SYSTEM = [{"role": "system", "content": "S"}]
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"system": "S", "instruction": "Q", "input": "", "output": "A", "history": []},
        {"system": "S", "prompt": "Q", "completion": "A"},
        {"system": " S\n", "messages": [*SYSTEM, *TURNS]},
    ],
)
def test_a_system_text_beside_the_turns_is_the_system_message(record: dict[str, Any]) -> None:
    assert parse_record(record, READING)[1] == (Message("system", "S"), *QUESTION_AND_ANSWER)
    assert parse_record(record | {"system": " ", "messages": TURNS}, READING)[1] == QUESTION_AND_ANSWER


LOST = [
    ({"system": "T", "messages": [*SYSTEM, *TURNS]}, "has a 'system' and another system message"),
    ({"system": ["S"], "messages": TURNS}, "key 'system' holds an array"),
    ({"instruction": "Q", "input": "C", "context": "D", "output": "A"}, "its 'context' would be left out: it has 'inp"),
    ({"instruction": "Q", "output": "A", "response": "B"}, "its 'response' would be left out: it has 'output' too"),
    (
        {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
        "its 'history' would be left out: write those turns",
    ),
    ({"prompt": "Q", "completion": "A", "history": [["q", "a"]]}, "its 'history' would be left out"),
    ({"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS]}, "message 2 has the weight 0, which would be ignored"),
]


@pytest.mark.parametrize(("record", "message"), LOST)
def test_nothing_that_a_form_knows_is_lost(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse_record(record, READING)


def test_what_is_there_twice_or_says_nothing_is_no_loss() -> None:
    record = {"instruction": "Q", "input": " ", "context": None, "output": "A", "response": "A", "history": None}
    assert parse_record(record, READING)[1] == QUESTION_AND_ANSWER
    weighed = [TURNS[0], TURNS[1] | {"weight": 1}]
    assert parse_record({"messages": weighed}, READING)[1] == QUESTION_AND_ANSWER


def _turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role} for role in roles]}


BAD_RECORDS = [
    ([1], "not an object"),
    ({"body": "x"}, r"none of the known forms: .*prompt and completion;.*text \(keys: 'body'\)"),
    ({}, r"keys: none"),
    ({"messages": "x"}, "is not a list of messages"),
    ({"messages": []}, "no assistant turn"),
    ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no 'role' and 'content'"),
    (_turns("user"), "no assistant turn"),
    (_turns("user", "tool", "assistant"), "message 2 has the unknown role 'tool'"),
    (_turns("user", "user", "assistant"), "message 2 is by user, assistant is due"),
    (_turns("assistant"), "message 1 is by assistant, user is due"),
    (_turns("user", "system", "assistant"), "message 2 is by system, assistant is due"),
    ({"prompt": "Q", "completion": " \n"}, "message 2, by assistant, is empty"),
    ({"prompt": "", "completion": "A"}, "message 1, by user, is empty"),
    ({"prompt": 3, "completion": "A"}, "'prompt' holds a number"),
    ({"conversations": [{"from": "human", "value": ["Q"]}]}, "'value' of message 1 holds an array"),
    ({"text": "Q: x A: y"}, "no '### Human:'; name the right --instruction_template"),
    ({"text": "### Human: Q"}, "no '### Assistant:'; name the right --response_template"),
    ({"text": "### Human: Q### Assistant:"}, "message 2, by assistant, is empty"),
    ({"text": None}, "none of the known forms"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_what_is_no_conversation(record: Any, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse_record(record, READING)


def test_every_bad_record_is_named_with_its_line(write_jsonl: Callable[..., Path]) -> None:
    good = {"prompt": "Q", "completion": "A"}
    file = write_jsonl([good, {"text": "x"}, good, _turns("user")])
    with file.open("ab") as stream:
        stream.write(b'{"broken": \n\n\xff\xfe\n')
        stream.write(b'{"n": ' + b"7" * 5_000 + b"}\n" + b"[" * 100_000 + b"\n")
    with pytest.raises(UserError) as caught:
        _read(file)
    told = str(caught.value)
    for expected in (
        "line 2: its text has",
        "line 4: no assistant turn",
        "line 5: broken JSON",
        "line 7: invalid UTF-8",
        "line 8: broken JSON: Exceeds the limit",
        "line 9: broken JSON",
    ):
        assert f"{file}, {expected}" in told
    assert "--on_error skip" in told


def test_many_bad_records_are_counted(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="15 more; mend them"):
        _read(write_jsonl([{}] * 25))


def test_bad_records_can_be_skipped(write_jsonl: Callable[..., Path]) -> None:
    file = write_jsonl([{"prompt": "Q", "completion": "A"}, {}, {"text": "x"}])
    skipped = Skipped()
    (only,) = _read(file, on_error="skip", skipped=skipped)
    assert (only.place, only.messages, skipped.count) == (f"{file}, line 1", QUESTION_AND_ANSWER, 2)
    assert "line 2" in skipped.summary()


def test_file_formats(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    records = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}] * 2
    lines = "\n".join(map(json.dumps, records)).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "blank_first.json").write_text("\n \r\n" + json.dumps(records, indent=1))
    (tmp_path / "bom_first.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(records).encode())
    (tmp_path / "blank_lines.jsonl").write_bytes(b"\n\n" + lines.replace(b"\n", b"\n\n"))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for file in tmp_path.iterdir():
        assert [item.messages for item in _read(file)] == [QUESTION_AND_ANSWER] * 2, file
    assert _read(tmp_path / "array.json")[1].place.endswith("record 2")
    assert _read(tmp_path / "a.parquet")[1].place.endswith("row 2")
    assert _read(tmp_path / "blank_lines.jsonl")[1].place.endswith("line 5")


def test_broken_files(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"prompt": "Q", "completion": "A" * 999}).encode())
    cases = {
        "cut.jsonl.gz": (whole[:-10], "after line .*damaged or truncated"),
        "cut.json": (b'[{"prompt": "Q"},', "the whole file: broken JSON"),
        "cut.parquet": (b"PAR1", "is not a whole parquet file"),
        "notes.txt": (b"x", "conversations come in .json"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            _read(tmp_path / name)
