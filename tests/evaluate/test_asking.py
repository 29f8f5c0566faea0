"""A model is asked with the very tokens that stood before the answer when a record was trained on."""

from __future__ import annotations

from typing import Any

import pytest

from train.data.document_formats import BadDocumentError
from train.errors import UserError
from train.evaluate.asking import Asking, fields_of
from train.evaluate.questions import parse
from train.finetune import chat_template, masks
from train.finetune.conversations import Conversation
from train.finetune.generate import prompt_ids
from train.finetune.prompt_presets import PRESETS
from train.finetune.prompt_template import PromptTemplate
from train.finetune.record_formats import FORMATS, Reading, parse_record

TURNS = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
SYSTEM = {"role": "system", "content": "Be brief."}
RECORDS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": [SYSTEM, *TURNS, {"role": "user", "content": "and\nthen?"}, {"role": "assistant", "content": "you"}]},
    {"messages": [*TURNS, {"role": "user", "content": "left out"}]},
    {"conversations": [{"from": "human", "value": "猫は？"}, {"from": "gpt", "value": "犬"}], "system": "短く。"},
    {"prompt": "p", "completion": "a"},
    {"prompt": "p", "completion": "a", "input": "it"},
    {"prompt": [SYSTEM, TURNS[0]], "completion": "a"},
    {"prompt": [TURNS[0]], "completion": [TURNS[1], TURNS[0], TURNS[1]]},
    {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
    {"instruction": "Add.", "input": " ", "output": "3"},
    {"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."},
    {"instruction": "", "input": "only {this}", "output": "x"},
    {"input": "only", "output": "x"},
    {"instruction": "Who?", "context": "It was Rome.", "response": "x"},
    {"instruction": "Who?", "input": '"It\'s"', "output": "x", "category": "qa", "title": "T", "text": "unused"},
    {"instruction": "Who?", "input": None, "output": "x", "category": None, "title": " "},
    {"question": "Who {context}?", "context": "It was {question}.", "answers": ["Rome", "a"], "title": "T"},
    {"question": "Who?", "context": "It was Rome.", "answers": {"text": ["Rome"], "answer_start": [7]}},
    {"question": "Who?", "answer": "Rome", "input": "none of it"},
    {"text": "Be brief.\n### Human: q### Assistant: a</s>### Human: r### Assistant: b</s>"},
    {"text": "### Human: q### Assistant: a"},
]
OF_OTHERS = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS: dict[str, PromptTemplate | None] = {
    "no prompt template": None,
    "another's chat template": None,
    **{name: PromptTemplate.parse(*texts) for name, texts in PRESETS.items()},
    "a field of its own": PromptTemplate.parse("Topic: {category}\nQ: {instruction}\nA: {output}"),
    "jsquad": PromptTemplate.parse("題: {title}\n\n文脈: {context}\n\n設問: {question}\n\n答え: {answer[text]}"),
    "input alone": PromptTemplate.parse("{input} {output}"),
    "no field of the form": PromptTemplate.parse('say "+ message[{{x}}]" \\ {topic}\n{category}\n{output}'),
    "the system text": PromptTemplate.parse("{system}\n{instruction}\n{output}"),
}


def template_of(name: str) -> str:
    prompt = PROMPTS[name]
    if prompt is not None:
        return prompt.chat_template()
    return OF_OTHERS if name == "another's chat template" else chat_template.build("### Human:", "### Assistant:")


def asked_ids(tokenizer: Any, record: dict[str, Any], **how: Any) -> list[int]:
    """As evaluations ask: what knows nothing of the training but the tokenizer."""
    reading = Reading("### Human:", "### Assistant:")
    (prompt,) = Asking(reading, **how).prompts(tokenizer, [parse(record, reading, number=1, place="here")])
    return prompt_ids(tokenizer, prompt, raw=how.get("raw", False) or not tokenizer.chat_template)


@pytest.fixture
def tokenizer(bytes_: Any) -> Any:
    yield bytes_
    bytes_.chat_template = None


def test_every_form_is_asked_as_it_was_trained(tokenizer: Any) -> None:
    walked: dict[str, set[str]] = {name: set() for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        tokenizer.chat_template = template_of(name)
        for record in RECORDS:
            try:
                form, messages = parse_record(record, Reading("### Human:", "### Assistant:", prompt))
            except BadDocumentError:  # what cannot be trained on under this template
                continue
            (example,) = masks.encode(tokenizer, [Conversation("here", messages)])
            *_, (start, _, is_trained) = masks.runs(example.labels)
            assert is_trained
            assert asked_ids(tokenizer, record) == list(example.input_ids[:start]), (name, record)
            walked[name].add(form)
    for name in ("no prompt template", "another's chat template", "alpaca", "dolly_ja", "squad"):
        assert walked[name] == set(FORMATS), name
    assert all(len(forms) >= 4 for forms in walked.values()), walked


def test_what_a_user_reads_in_the_prompt(tokenizer: Any) -> None:
    """Written out, so that training and asking cannot be wrong together."""
    dolly = {"instruction": "Add.", "context": "1 and 2", "response": "3"}
    expected = {
        "no prompt template": "### Human: Add.\n\n1 and 2\n### Assistant:",
        "dolly_ja": "### Instruction:\nAdd.\n### Input:\n1 and 2\n### Response:\n",
    }
    for name, text in expected.items():
        tokenizer.chat_template = template_of(name)
        assert tokenizer.decode(asked_ids(tokenizer, dolly)) == text
    tokenizer.chat_template = template_of("squad")
    assert tokenizer.decode(asked_ids(tokenizer, RECORDS[16])) == "It was {question}.\n\nQ: Who {context}?\nA:"
    tokenizer.chat_template = template_of("a field of its own")
    record = {"category": "sums", "instruction": "Add.", "output": "3"}
    assert tokenizer.decode(asked_ids(tokenizer, record)) == "Topic: sums\nQ: Add.\nA:"


def test_what_the_model_was_trained_with_is_missing(tokenizer: Any) -> None:
    tokenizer.chat_template = template_of("a field of its own")
    reading = Reading("### Human:", "### Assistant:")
    record = {"instruction": "Add.", "output": "3"}
    questions = [parse(record, reading, number=n, place=f"--question_files qa, line {n}") for n in range(12)]
    with pytest.raises(UserError) as caught:
        Asking(reading).prompts(tokenizer, questions)
    assert caught.value.problems[0].startswith("--question_files qa, line 0: no key 'category'")
    assert len(caught.value.problems) == 11 and caught.value.problems[-1] == "2 more records cannot be asked."


def test_the_fields_that_templates_of_others_name() -> None:
    knows_input = "{% for message in messages %}{{ message['content'] }}{{ message['input'] }}{% endfor %}"
    for text in (knows_input, "{{ message.input }}"):
        found = fields_of(text)
        assert found is not None and found.fields == ("instruction", "input")
    assert fields_of(OF_OTHERS) is fields_of(None) is fields_of("{{ message['tool_calls'] }}") is None


def test_without_a_chat_template(tokenizer: Any) -> None:
    raw = "{title}: {context}\n\nQ: {question}\nA:"

    def asked(record: dict[str, Any], **how: Any) -> str:
        return str(tokenizer.decode(asked_ids(tokenizer, record, **how)))

    squad = RECORDS[16]  # braces of the data stay
    assert asked(squad, raw_template=raw) == "T: It was {question}.\n\nQ: Who {context}?\nA:"
    assert asked(squad) == "It was {question}.\n\nWho {context}?"
    assert asked(RECORDS[18], raw_template=raw) == "Who?"
    assert asked(RECORDS[8], raw_template=raw) == "Add the numbers.\n\n1 and 2"
    assert asked(RECORDS[1]) == "Be brief.\nwho?\nme\nand\nthen?"
    assert asked(RECORDS[19]) == "Be brief.\nq\na\nr"  # without the end token that the text carries
    tokenizer.chat_template = template_of("squad")
    assert asked(squad, raw=True) == "It was {question}.\n\nWho {context}?"
    tokenizer.chat_template = {"default": template_of("dolly_ja"), "tool_use": "x"}
    template = Asking(Reading("", "")).template(tokenizer)
    assert template == template_of("dolly_ja")
