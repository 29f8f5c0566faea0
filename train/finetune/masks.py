"""Which tokens are trained: exactly the answers and their end tokens, and a view of it for people.

    examples = encode(tokenizer, conversations)          # the tokenizer carries the chat template
    print_examples(tokenizer, examples, stream=sys.stdout)

The chat template says in characters what is trained. Where that begins and ends in tokens is found by encoding the
text up to there: what a model is given when it is asked for the answer is then, id for id, what came before the answer
in training. transformers' own mask (`return_assistant_tokens_mask`) looks positions up instead, and is empty for
byte-level tokenizers with `trim_offsets`, GPT-2's and Llama 3's kind: the blank before the answer belongs to no token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from train.finetune.conversations import Conversation
from train.finetune.record_turns import turns_without_end

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Answer:
    """Where an answer stands among the tokens.

    Attributes:
        start: its first trained token.
        end: the token after its last one; as `start` when it was joined away.
        begins_joined: whether it begins inside a token, so that the prompt given at generation is not quite the one
            that was trained on.
        ends_joined: whether it ends inside a token.
        ends_open: whether its last token is another one than the end token.
    """

    start: int
    end: int
    begins_joined: bool
    ends_joined: bool
    ends_open: bool


@dataclass(frozen=True)
class Example:
    """A conversation in tokens.

    Attributes:
        place: file and line it came from.
        input_ids: token ids of the whole text.
        labels: the same ids where they are trained, `IGNORED` elsewhere.
        answers: what of it is trained, in order.
    """

    place: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    answers: tuple[Answer, ...] = ()

    @property
    def trained(self) -> int:
        """The number of tokens that are trained. The first one never is: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def joined(self) -> int:
        """How many answers begin or end inside a token."""
        return sum(answer.begins_joined or answer.ends_joined for answer in self.answers)

    @property
    def ends_open(self) -> int:
        """How many answers do not end with the end token."""
        return sum(answer.ends_open for answer in self.answers)

    def cut(self, length: int) -> Example:
        """The first `length` tokens. An answer that loses its end is open: nothing after it teaches to stop."""
        answers = [
            answer if answer.end <= length else Answer(answer.start, length, answer.begins_joined, False, True)
            for answer in self.answers
            if answer.start < length
        ]
        return Example(self.place, self.input_ids[:length], self.labels[:length], tuple(answers))


def encode(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Example]:
    """The examples of some conversations, rendered by the tokenizer's chat template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chats = [turns_without_end(conversation.as_dicts(), tokenizer.eos_token) for conversation in conversations]
    rendered: Any = render_jinja_template(
        conversations=chats,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    pieces = [
        piece
        for text, marks in zip(texts, spans, strict=True)
        for piece in (text, *(text[:end] for span in marks for end in span))
    ]
    ids = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    return [
        _example(conversation.place, next(ids), [(next(ids), next(ids)) for _ in marks], tokenizer.eos_token_id)
        for conversation, marks in zip(conversations, spans, strict=True)
    ]


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """What a model is given to answer `messages`, whose last one is a question."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """First token, token after the last, and whether it is trained, for each stretch of equal training."""
    start = 0
    for position in range(1, len(labels) + 1):
        is_trained = labels[start] != IGNORED
        if position == len(labels) or (labels[position] != IGNORED) != is_trained:
            yield start, position, is_trained
            start = position


def print_examples(tokenizer: Any, examples: Sequence[Example], *, stream: TextIO) -> None:
    """Shows what is trained, read back from the tokens: in green on a terminal, between [[ and ]] elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    how = "in green" if console.is_terminal else "between [[ and ]]"
    console.print(f"What is trained, {how}, in the first {len(examples)} examples:", markup=False)
    for example in examples:
        text = Text(f"{example.place}: {len(example.input_ids)} tokens, {example.trained} trained\n")
        shown = ""
        for _, end, is_trained in runs(example.labels):
            # Decoded from the beginning each time: decoders drop a leading blank.
            upto = tokenizer.decode(list(example.input_ids[:end]), skip_special_tokens=False)
            part, shown = upto[len(shown) :], upto
            if is_trained:
                text.append(part if console.is_terminal else f"[[{part}]]", style="bold green")
            else:
                text.append(part, style="dim")
        console.print(text)


def _example(place: str, ids: list[int], marks: list[tuple[list[int], list[int]]], eos_id: int | None) -> Example:
    labels = [IGNORED] * len(ids)
    answers = []
    for before, upto in marks:
        start, end = _shared(before, ids), _shared(upto, ids)
        labels[start:end] = ids[start:end]
        is_open = end == start or ids[end - 1] != eos_id
        answers.append(Answer(start, end, start < len(before), end < len(upto), is_open))
    return Example(place, tuple(ids), tuple(labels), tuple(answers))


def _shared(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading ids two sequences have in common."""
    if prefix == ids[: len(prefix)]:
        return len(prefix)
    return next(n for n, (one, other) in enumerate(zip(prefix, [*ids, None], strict=False)) if one != other)
