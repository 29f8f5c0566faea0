"""Chooses what a tokenizer is trained on and what it is measured on, in one pass over any amount of text.

    sample = draw_sample(read_documents(files), sentence_limit=3_000_000, shuffle=True, seed=0)

Memory is bounded by the sample: a reservoir of `sentence_limit` sentences, and at most `_HELD_OUT_DOCUMENTS`
documents set aside for the report.

A sentence is a line, as SentencePiece has it. A document's first line gets a space before it and its other lines do
not, because that is how the trained model will see them: it puts one space before a whole text, and the newline is a
symbol of its own. (The trainer's own dummy prefix, put before every line, would count a space per line of code.)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MAX_SENTENCE_BYTES = 4192  # SentencePiece's own limit, above which it drops a sentence
_HELD_OUT_EVERY = 20
_HELD_OUT_DOCUMENTS = 1000
_HELD_OUT_CHARACTERS = 50_000  # longer documents are trained on, never held out: they would fill the memory
_SEEN_DOCUMENTS = 100  # measured when there is too little text to hold any out
# Sentences that hold one of these are dropped or cut by the trainer: its unknown mark, its boundary mark, NUL.
_TRAINER_MARKS = ("▅", "\x00")


@dataclass
class Sample:
    """What `draw_sample` chose.

    Attributes:
        sentences: to train on, in the order of the text or, when shuffled, in random order.
        held_out: whole documents that were not trained on.
        seen: a few of those that were, for a corpus too small to hold any out.
        documents: documents read, held-out ones included.
        sentences_read: sentences that the documents read held, held-out ones not included.
    """

    sentences: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    documents: int = 0
    sentences_read: int = 0

    @property
    def is_unseen(self) -> bool:
        """Whether the documents to measure on were kept out of training."""
        return bool(self.held_out)


def draw_sample(documents: Iterable[str], *, sentence_limit: int, shuffle: bool, seed: int) -> Sample:
    """Reads the documents once and keeps a sample.

    Args:
        documents: whole texts.
        sentence_limit: sentences to keep; 0 keeps all.
        shuffle: every sentence has the same chance, else the first `sentence_limit` are kept and reading ends there.
        seed: the same documents and seed give the same sample.
    """
    sample = Sample()
    chance = random.Random(seed)
    for sentence in _training_sentences(documents, sample, chance):
        sample.sentences_read += 1
        if not sentence_limit or len(sample.sentences) < sentence_limit:
            sample.sentences.append(sentence)
        elif shuffle:
            place = chance.randrange(sample.sentences_read)
            if place < sentence_limit:
                sample.sentences[place] = sentence
        if not shuffle and len(sample.sentences) == sentence_limit:
            break
    if shuffle:
        chance.shuffle(sample.sentences)
    return sample


def split_sentences(document: str, *, max_bytes: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """The lines of a document as the trained model will see them, none longer than `max_bytes` in UTF-8."""
    for number, line in enumerate((" " + document).split("\n")):
        for mark in _TRAINER_MARKS:
            line = line.replace(mark, "\n")
        for part in line.split("\n"):
            if part and (number or part != " "):
                yield from _pieces_of(part, max_bytes)


def _pieces_of(line: str, max_bytes: int) -> Iterator[str]:
    """The line, or parts of it that end before a space where there is one in the later half."""
    start = 0
    while 4 * (len(line) - start) > max_bytes:  # a character takes four bytes at most
        part = line[start : start + max_bytes].encode()[:max_bytes].decode(errors="ignore")
        if start + len(part) == len(line):
            break
        space = part.rfind(" ", len(part) // 2)
        end = start + (space if space > 0 else len(part))
        yield line[start:end]
        start = end
    yield line[start:]


def _training_sentences(documents: Iterable[str], sample: Sample, chance: random.Random) -> Iterator[str]:
    """The sentences of all documents but the held-out ones, which are a uniform sample of every twentieth."""
    candidates = 0
    for document in documents:
        sample.documents += 1
        trained: str | None = document
        if sample.documents % _HELD_OUT_EVERY == 0 and len(document) <= _HELD_OUT_CHARACTERS:
            candidates += 1
            if len(sample.held_out) < _HELD_OUT_DOCUMENTS:
                sample.held_out.append(document)
                trained = None
            else:
                place = chance.randrange(candidates)
                if place < _HELD_OUT_DOCUMENTS:  # the one that gives way is trained on after all
                    trained, sample.held_out[place] = sample.held_out[place], document
        if trained is None:
            continue
        if len(sample.seen) < _SEEN_DOCUMENTS:
            sample.seen.append(trained[:_HELD_OUT_CHARACTERS])
        yield from split_sentences(trained)
