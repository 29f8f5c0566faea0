"""What a model is asked: the question of a record, as its finetuning wrote it before the answer.

    asking = Asking(Reading("### Human:", "### Assistant:"), raw_template="{context}\\n\\nQ: {question}\\nA:")
    asking.prompts(tokenizer, questions)

A model's chat template is what finetuning saved with it, so it also says which fields of a record a question has: those
that `train.finetune.prompt_template` writes beside a user's text. The rest is finetuning's own reading of the record.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.document_formats import BadDocumentError
from train.errors import refuse
from train.evaluate.questions import Question
from train.finetune.prompt_notation import INPUT, INSTRUCTION
from train.finetune.record_formats import QuestionFields, Reading, parse_question
from train.finetune.record_turns import turns_without_end
from train.generate.prompts import Prompt

# A field as a prompt template's chat template has it; texts of the template cannot look so, their quotes are escaped.
_FIELD = re.compile(r'\+ message\["([^"\\]+)"\] }}')
_TAKES_INPUT = re.compile(r"message(\.input\b|\[['\"]input['\"]\])")  # in templates of others


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        reading: how records are read; its prompt template is the asked model's own.
        raw_template: for a model without a chat template, of SQuAD's questions with a context: has `{context}`,
            `{question}` and `{title}`. None asks the plain question.
        raw: leave the chat template out.
    """

    reading: Reading
    raw_template: str | None = None
    raw: bool = False

    def template(self, tokenizer: Any) -> str | None:
        """The chat template that is asked through; None without one."""
        own = tokenizer.chat_template
        return None if self.raw else own.get("default") if isinstance(own, Mapping) else own

    def prompts(self, tokenizer: Any, questions: Sequence[Question]) -> list[Prompt]:
        """A prompt for each question.

        Raises:
            UserError: a record has not what the model's template names; the first ten of them are told.
        """
        template = self.template(tokenizer)
        reading = dataclasses.replace(self.reading, prompt=fields_of(template))
        found: list[Prompt] = []
        problems: list[str] = []
        for question in questions:
            try:
                found.append(self._prompt(question, reading, has_template=bool(template), end=tokenizer.eos_token))
            except BadDocumentError as error:
                problems.append(f"{question.place}: {error}, and the model was trained with that template.")
        refuse(problems, rest="records cannot be asked")
        return found

    def _prompt(self, question: Question, reading: Reading, *, has_template: bool, end: str | None) -> Prompt:
        form, messages, _ = parse_question(question.record, reading)
        turns = tuple(turns_without_end([one.as_dict() for one in messages], end))
        if has_template:
            return Prompt(turns[-1]["content"], turns)
        if form == "squad" and self.raw_template is not None and (question.record.get("context") or "").strip():
            record = question.record
            values = {name: str(record.get(name) or "") for name in ("context", "question", "title")}
            return Prompt(re.sub(r"\{(context|question|title)\}", lambda found: values[found[1]], self.raw_template))
        return Prompt("\n".join(turn["content"] for turn in turns))  # a model that was never taught turns


@dataclass(frozen=True)
class _Fields:
    main: str
    fields: tuple[str, ...]


def fields_of(chat_template: str | None) -> QuestionFields | None:
    """The fields of the prompt template that a chat template was made of; None when it has but the question.

    What the main field was called is not kept, nor does it matter: it is the question, or the one text there is.
    """
    others = tuple(dict.fromkeys(_FIELD.findall(chat_template or "")))
    if not others and chat_template and _TAKES_INPUT.search(chat_template):
        others = (INPUT,)
    return _Fields(INSTRUCTION, (INSTRUCTION, *others)) if others else None
