"""A prompt template is read, refused when it cannot be one, and becomes a chat template that writes the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.finetune import chat_template, data_settings, prompt_template
from train.finetune.prompt_presets import PRESETS
from train.finetune.prompt_template import PromptTemplate
from train.finetune.settings import FinetuneSettings

END = "</s>"


def _rendered(template: PromptTemplate, *messages: dict[str, str], asked: bool = False) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template.chat_template(),
        add_generation_prompt=asked,
        eos_token=END,
        bos_token="<s>",
    )
    return str(texts[0][0])


def _user(content: str, **fields: str) -> dict[str, str]:
    return {"role": "user", "content": content, **fields}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("Q {instruction}\nI {input}\nA {output}", {"input": "i"}, "Q q\nI i\nA a"),
        ("Q {instruction}\nI {input}\nA {output}", {}, "Q q\nA a"),
        ("I {context}\nQ {question}\nA {answer}", {"input": "i"}, "I i\nQ q\nA a"),
        ("I {context}\nQ {question}\nA {answer}", {}, "Q q\nA a"),
        ("Do it.\n\nI {input}\n\nQ {prompt}\n\nA:{completion}", {"input": "i"}, "Do it.\n\nI i\n\nQ q\n\nA:a"),
        ("Do it.\n\nI {input}\n\nQ {prompt}\n\nA:{completion}", {}, "Do it.\n\nQ q\n\nA:a"),
        ("T {title}\nC {input}\nQ {instruction}\nA:\n", {"title": "t"}, "T t\nQ q\nA:\na"),
        ("T {title}\nC {input}\nQ {instruction}\nA:\n", {"input": "c"}, "C c\nQ q\nA:\na"),
        ("{{x}} {instruction} }}\"'\\ {{ {output}", {}, "{x} q }\"'\\ { a"),
        ("{instruction}{output}\n", {}, "qa"),
        ("以下の指示に答えよ。\n指示：{instruction}\n応答：{output}", {}, "以下の指示に答えよ。\n指示：q\n応答：a"),
    ],
)
def test_what_a_template_writes(text: str, fields: dict[str, str], expected: str) -> None:
    template = PromptTemplate.parse(text)
    assert _rendered(template, _user("q", **fields), _assistant("a")) == expected + END
    asked = _rendered(template, _user("q", **fields), asked=True)
    assert asked == expected.removesuffix("a").rstrip(" ")


def test_two_templates_and_several_turns() -> None:
    template = PromptTemplate.parse(*PRESETS["alpaca"])
    both, alone = (text.partition("###")[0] for text in PRESETS["alpaca"] if text)
    chat = [_user("q", input="i"), _assistant("a"), _user("r"), _assistant("b")]
    first = f"### Instruction:\nq\n\n### Input:\ni\n\n### Response:\na{END}"
    second = f"\n\n### Instruction:\nr\n\n### Response:\nb{END}"
    assert _rendered(template, *chat) == both + first + second
    assert _rendered(template, _user("q"), asked=True) == f"{alone}### Instruction:\nq\n\n### Response:\n"
    told = _rendered(template, {"role": "system", "content": "Be brief."}, *chat)
    assert told == f"Be brief.\n\n{first}{second}"  # in place of the preset's first sentence


def test_turns_stand_as_close_as_the_parts_of_one() -> None:
    template = PromptTemplate.parse(*PRESETS["dolly_ja"])
    told = _rendered(template, {"role": "system", "content": "S"}, _user("q"), _assistant("a"), _user("r"), asked=True)
    turns = f"### Instruction:\nq\n### Response:\na{END}\n### Instruction:\nr\n### Response:\n"
    assert told == f"S\n{turns}"


def test_all_presets_mark_what_is_trained() -> None:
    for name in PRESETS:
        template = PromptTemplate.parse(*prompt_template.find(name)).chat_template()
        assert chat_template.marks_training(template), name


def test_bos_is_written_where_the_tokenizer_begins_with_it() -> None:
    template = PromptTemplate.parse("{prompt} {completion}").chat_template(begins_with_bos=True)
    assert template.startswith("{{ bos_token }}")


BAD_TEMPLATES = [
    ("### Instruction:", "neither a template with a field"),
    ("alpca", "did you mean alpaca?"),
    ("{output}", "has no field for the question"),
    ("{instruction", "expected '}' before end of string; a brace that is none of a field's is written twice"),
    ("{instruction} }", "Single '}' encountered"),
    ("{}{output}", "{} is no field"),
    ("{instruction:>8}", "{instruction} is no field: write a name only"),
    ("{instruction!r}", "{instruction} is no field"),
    ("{a.b}", "{a.b} is no field"),
    ("{instruction} {prompt}", "has {prompt} twice; instruction, prompt and question are one"),
    ("{input} {context}", "has {context} twice"),
    ("{content}", "{content} cannot be a field"),
    ("{output} {instruction}", "{instruction} stands behind the answer"),
    ("{instruction} {output} {answer}", "{answer} stands behind the answer"),
    ("{instruction}\n{output}\nEnd.", "'End.' stands behind the answer"),
]


def _settings(**given: Any) -> FinetuneSettings:
    return FinetuneSettings("owner/name", Path("out"), **given)


@pytest.mark.parametrize(("text", "message"), BAD_TEMPLATES)
def test_what_is_no_template(text: str, message: str) -> None:
    (problem,) = _settings(prompt_template=text).problems()
    assert problem.startswith("--prompt_template") and message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{input}{output}", "must have the fields of --prompt_template but for {input}: it has {input}, the other"),
        ("{instruction} so: {output}", "must have the same text before the answer"),
        ("{instruction", "--prompt_template_without_input: expected '}'"),
    ],
)
def test_two_templates_that_do_not_fit(text: str, message: str) -> None:
    given = {"prompt_template": "{instruction} {input} {output}", "prompt_template_without_input": text}
    (problem,) = _settings(**given).problems()
    assert message in problem


def test_one_for_records_without_input_alone_is_refused() -> None:
    (problem,) = _settings(prompt_template_without_input="{instruction}").problems()
    assert "has no effect without --prompt_template" in problem


def test_a_file_and_a_shells_line_ends(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Q: {instruction}\nA: {output}\n")
    from_file = _settings(prompt_template=str(tmp_path / "prompt.txt")).with_line_ends()
    from_shell = _settings(prompt_template="Q: {instruction}\\nA: {output}").with_line_ends()
    assert from_file.prompt_template == from_shell.prompt_template == "Q: {instruction}\nA: {output}"
    assert from_file.with_line_ends() == from_file  # what recipe.yaml of a run holds gives the same run
    preset = _settings(prompt_template="alpaca").with_line_ends()
    assert (preset.prompt_template, preset.prompt_template_without_input) == PRESETS["alpaca"]
    assert data_settings.prompt_of(preset) == PromptTemplate.parse(*PRESETS["alpaca"])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe{")
    for name in (tmp_path / "none.txt", tmp_path / "bad.txt", tmp_path):
        with pytest.raises(UserError, match="neither a template with a field"):
            prompt_template.find(str(name))


def test_the_users_template_wins_over_the_tokenizers(tokenizer: Any) -> None:
    prompt = PromptTemplate.parse("{prompt} {completion}")
    words = {"instruction_template": "### Human:", "response_template": "### Assistant:"}
    template, notice = chat_template.choose(tokenizer, **words, prompt=prompt)
    assert template == prompt.chat_template()
    assert notice == "the tokenizer's chat template is replaced by --prompt_template"
