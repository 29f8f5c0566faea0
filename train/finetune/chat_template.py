"""The chat template: how a conversation becomes text, and which part of the text is trained.

    template, notice = choose(tokenizer, instruction_template="### Human:", response_template="### Assistant:")
    tokenizer.chat_template = template

Transformers, TRL and inference servers all render conversations by the Jinja template saved with the tokenizer, so the
text that is generated from is the text that was trained on. The answer and the end token stand between
`{% generation %}` and `{% endgeneration %}`: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.finetune.prompt_template import PromptTemplate

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def build(instruction_template: str, response_template: str, *, begins_with_bos: bool = False) -> str:
    """A Jinja template that renders `### Human: QUESTION` / `### Assistant: ANSWER</s>`, a part a line.

    A template that ends in white space (`### 指示:\\n`) is followed by the text directly, another by one space. That
    space belongs to the answer: tokenizers join it to the first word, so the prompt must end before it.

    Args:
        instruction_template: stands before each question.
        response_template: stands before each answer, and ends the prompt when an answer is to be generated.
        begins_with_bos: the text begins with the tokenizer's bos token.
    """
    question, question_gap = _with_gap(instruction_template)
    answer, answer_gap = _with_gap(response_template)
    opening = question.lstrip("\n")
    between_turns = question if question.startswith("\n") else "\n" + question
    before_answer = answer if answer.startswith("\n") else "\n" + answer
    parts = [
        "{{ bos_token }}" if begins_with_bos else "",
        "{% for message in messages %}",
        "{% if message['role'] == 'system' %}{{ message['content'] }}",
        "{% elif message['role'] == 'user' %}",
        f"{{% if loop.first %}}{{{{ {quoted(opening)} }}}}{{% else %}}{{{{ {quoted(between_turns)} }}}}{{% endif %}}",
        f"{{{{ {quoted(question_gap)} + message['content'] }}}}",
        "{% else %}",
        f"{{{{ {quoted(before_answer)} }}}}",
        f"{{% generation %}}{{{{ {quoted(answer_gap)} + message['content'] + eos_token }}}}{{% endgeneration %}}",
        "{% endif %}",
        "{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {quoted(before_answer)} }}}}{{% endif %}}",
    ]
    return "".join(parts)


def choose(
    tokenizer: Any, *, instruction_template: str, response_template: str, prompt: PromptTemplate | None = None
) -> tuple[str, str | None]:
    """The template to train with, and what to tell the user about it.

    A prompt template is what the user asked for; else the tokenizer's own template is kept when it marks what is
    trained.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if prompt is not None:
        notice = "the tokenizer's chat template is replaced by --prompt_template" if own else None
        return prompt.chat_template(begins_with_bos=_begins_with_bos(tokenizer)), notice
    if own and marks_training(own):
        return own, "the tokenizer's own chat template is used; --instruction_template only serves to read the data"
    begins_with_bos = _begins_with_bos(tokenizer)
    built = build(instruction_template, response_template, begins_with_bos=begins_with_bos)
    notice = "the tokenizer's chat template has no {% generation %} marks and is replaced" if own else None
    return built, notice


def marks_training(template: str) -> bool:
    """Whether a template tells which part is trained."""
    return _GENERATION.search(template) is not None


def _with_gap(template: str) -> tuple[str, str]:
    """A turn's template, and what stands between it and the turn's text."""
    return (template, "") if template[-1:].isspace() else (template, " ")


def quoted(text: str) -> str:
    """A Jinja string literal. JSON's is one, as long as nothing is spelt as a surrogate pair."""
    return json.dumps(text, ensure_ascii=False)


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins texts with bos by itself, and reads bos in a text as just that.

    The chat template must write it then: chat texts are encoded without the special tokens a tokenizer adds.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return False
    return tokenizer(tokenizer.bos_token + "a", add_special_tokens=False)["input_ids"][:1] == [bos]
