"""Prompt templates: `### Instruction:\\n{instruction}\\n### Response:\\n{output}`, and the chat template each becomes.

    template = PromptTemplate.parse("Task: {instruction}\\nGiven: {input}\\nAnswer: {output}")
    tokenizer.chat_template = template.chat_template()

The notation is Python's `str.format`: names in braces, `{{` for a brace. The template becomes the chat template that is
saved with the model, so whoever asks the model writes, letter for letter, what stood before the answer in training.

| names | what it is |
|---|---|
| `instruction`, `prompt`, `question` | the question; what a user says in a chat |
| `input`, `context` | what goes with it |
| `output`, `completion`, `response`, `answer` | the answer, at the end; without one it follows the template |
| any other | that key of the record |

A field that is empty is left out, with the text between it and the field before; of the text before the first field
only what stands behind its last blank line goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.errors import UserError
from train.finetune import prompt_notation
from train.finetune.chat_template import quoted
from train.finetune.prompt_notation import INPUT, INSTRUCTION, Form
from train.finetune.prompt_presets import PRESETS


@dataclass(frozen=True)
class PromptTemplate:
    """A template, or two of which the second is for records without input.

    Attributes:
        main: the field that a chat's user message stands for: instruction, or else the first.
        fields: all fields of the question, by the names of the module's table.
    """

    _full: Form
    _without_input: Form | None = None

    @staticmethod
    def parse(text: str, without_input: str | None = None) -> PromptTemplate:
        """Reads the notation.

        Raises:
            UserError: broken braces, no field, a field twice or one that cannot be, text behind the answer.
        """
        full = prompt_notation.parse(text, "--prompt_template")
        if without_input is None:
            return PromptTemplate(full)
        other = prompt_notation.parse(without_input, "--prompt_template_without_input")
        names, others = ({name for _, name in form.parts} for form in (full, other))
        if names - {INPUT} != others or INPUT not in names:
            raise UserError(
                "--prompt_template_without_input must have the fields of --prompt_template but for {input}: "
                f"it has {_listed(others)}, the other {_listed(names)}."
            )
        if other.before_answer != full.before_answer:
            raise UserError(
                "--prompt_template_without_input and --prompt_template must have the same text before the answer: "
                f"{other.before_answer!r} and {full.before_answer!r} differ."
            )
        return PromptTemplate(full, other)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for _, name in self._full.parts)

    @property
    def main(self) -> str:
        return INSTRUCTION if INSTRUCTION in self.fields else self.fields[0]

    def chat_template(self, *, begins_with_bos: bool = False) -> str:
        """A Jinja chat template. A user message has the main field as `content` and the others under their names.

        Answer and end token are marked as what is generated; blanks before an answer belong to it, since tokenizers
        join a blank to the word behind it.

        Args:
            begins_with_bos: the text begins with the tokenizer's bos token.
        """
        if self._without_input is None:
            question, answer = self._question(self._full), self._answer(self._full)
        else:
            test, end = "{% if message['input'] %}", "{% endif %}"
            short = self._without_input
            question = f"{test}{self._question(self._full)}{{% else %}}{self._question(short)}{end}"
            answer = self._answer(self._full)
        gap = self._full.before_answer[len(self._full.before_answer.rstrip(" ")) :]
        return "".join(
            [
                "{{ bos_token }}" if begins_with_bos else "",
                "{% for message in messages %}",
                f"{{% if message['role'] == 'system' %}}{{{{ message['content'] + {quoted(self._turn_end)} }}}}",
                f"{{% elif message['role'] == 'user' %}}{question}",
                f"{{% else %}}{answer}{{% generation %}}{{{{ {quoted(gap)} + message['content'] + eos_token }}}}",
                "{% endgeneration %}{% endif %}{% endfor %}",
                f"{{% if add_generation_prompt %}}{answer}{{% endif %}}",
            ]
        )

    @property
    def _turn_end(self) -> str:
        texts = (self._full.preamble, *(text for text, _ in self._full.parts), self._full.before_answer)
        return "\n\n" if any("\n\n" in text for text in texts) else "\n"

    def _answer(self, form: Form) -> str:
        prompt = form.before_answer.rstrip(" ")
        return f"{{{{ {quoted(prompt)} }}}}" if prompt else ""

    def _question(self, form: Form) -> str:
        after_system = "loop.index0 == 1 and messages[0]['role'] == 'system'"
        begin = f"{{% if loop.first %}}{{{{ {quoted(form.preamble)} }}}}{{% elif {after_system} %}}{{% else %}}"
        return f"{begin}{{{{ {quoted(self._turn_end)} }}}}{{% endif %}}" + "".join(self._parts(form))

    def _parts(self, form: Form) -> Iterator[str]:
        earlier: list[str] = []
        for text, name in form.parts:
            value = "message['content']" if name == self.main else f"message[{quoted(name)}]"
            heading = text.lstrip("\n") if earlier else text
            separator = text[: len(text) - len(heading)]
            part = f"{{{{ {quoted(heading)} + {value} }}}}"
            if separator:  # line ends between two parts: only where one stands before
                some = "true" if "message['content']" in earlier else " or ".join(earlier)
                part = f"{{% if {some} %}}{{{{ {quoted(separator)} }}}}{{% endif %}}{part}"
            yield part if name == self.main else f"{{% if {value} %}}{part}{{% endif %}}"
            earlier.append(value)


def find(name: str) -> tuple[str, str | None]:
    """The texts that `--prompt_template` means: a preset's two, a template as it stands, or a file's content.

    Raises:
        UserError: it is none of them.
    """
    if name in PRESETS:
        return PRESETS[name]
    if "{" in name:
        return name, None
    try:
        return Path(name).read_text(encoding="utf-8").removesuffix("\n"), None
    except (OSError, UnicodeDecodeError, ValueError):
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f" did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--prompt_template {name!r}:{hint} neither a template with a field such as {{instruction}}, nor a text "
            f"file, nor one of {', '.join(PRESETS)}."
        ) from None


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
