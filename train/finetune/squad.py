"""SQuAD: a context, a question, and where in the context the answer stands.

    for place, record in questions("the whole file", {"data": [{"title": ..., "paragraphs": [...]}]}):
        answer(record)

Both forms are read: the nested one of the original files (https://rajpurkar.github.io/SQuAD-explorer/), JSQuAD's too,
and the flat one of the Hub, `{"context", "question", "answers": {"text": [...], "answer_start": [...]}}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from train.data.document_formats import BadDocumentError, check_text


def is_nested(record: Any) -> bool:
    """Whether it is a whole original file, or one of its articles."""
    return isinstance(record, Mapping) and (_is_list(record, "paragraphs") or _is_list(record, "data"))


def questions(place: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The flat records of a nested one, each with its place; what has not its form is a `BadDocumentError`."""
    articles = record.get("data", [record])
    for article_number, article in enumerate(articles, start=1):
        where = f"{place}, article {article_number}"
        if not isinstance(article, Mapping) or not _is_list(article, "paragraphs"):
            yield where, BadDocumentError("no list 'paragraphs', as SQuAD's files have")
            continue
        for number, paragraph in enumerate(article["paragraphs"], start=1):
            inside = f"{where}, paragraph {number}"
            if not isinstance(paragraph, Mapping) or not _is_list(paragraph, "qas"):
                yield inside, BadDocumentError("no list 'qas', as SQuAD's files have")
                continue
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            for question_number, question in enumerate(paragraph["qas"], start=1):
                is_question = isinstance(question, Mapping)
                flat = {**shared, **question} if is_question else BadDocumentError("its question is not an object")
                yield f"{inside}, question {question_number}", flat


def answer(record: Mapping[str, Any]) -> str:
    """The answer to train on: the first, where several people gave one.

    Raises:
        BadDocumentError: there is none, as in SQuAD 2's questions that cannot be answered.
    """
    given = record["answers"] if record.get("answers") is not None else record.get("answer")
    if isinstance(given, Mapping):
        given = given.get("text")
    if isinstance(given, list):
        if not given:
            raise BadDocumentError("its question has no answer")
        given = given[0].get("text") if isinstance(given[0], Mapping) else given[0]
    return check_text(given, name="its answer")


def _is_list(record: Mapping[str, Any], key: str) -> bool:
    return isinstance(record.get(key), list)
