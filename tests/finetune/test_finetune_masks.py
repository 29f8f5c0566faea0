"""What is trained is the answers and their end tokens, to the token, whatever the conversation holds."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import converted_sentencepiece, random_conversation  # type: ignore[import-not-found]

from train.finetune import chat_template, masks
from train.finetune.conversations import Conversation
from train.finetune.record_formats import Message


def _conversation(messages: list[dict[str, str]]) -> Conversation:
    return Conversation("here, line 1", tuple(Message(turn["role"], turn["content"]) for turn in messages))


def _trained_texts(tokenizer: Any, example: masks.Example) -> list[str]:
    parts, before = [], ""
    for _, end, is_trained in masks.runs(example.labels):
        upto = tokenizer.decode(list(example.input_ids[:end]))
        parts += [upto[len(before) :]] if is_trained else []
        before = upto
    return parts


def test_hundreds_of_random_conversations(tokenizer: Any) -> None:
    source = random.Random(7)
    chats = [random_conversation(source) for _ in range(300)]
    examples = masks.encode(tokenizer, [_conversation(chat) for chat in chats])
    for chat, example in zip(chats, examples, strict=True):
        answers = [turn["content"] for turn in chat if turn["role"] == "assistant"]
        assert _trained_texts(tokenizer, example) == [f" {answer}</s>" for answer in answers]
        assert list(example.labels).count(tokenizer.eos_token_id) == len(answers)
        assert (example.joined, example.ends_open) == (0, 0)


def test_a_prompt_at_generation_is_a_prefix_of_what_was_trained(tokenizer: Any) -> None:
    source = random.Random(8)
    for _ in range(150):
        chat = random_conversation(source)
        (example,) = masks.encode(tokenizer, [_conversation(chat)])
        starts = [start for start, _, is_trained in masks.runs(example.labels) if is_trained]
        answers = [number for number, turn in enumerate(chat) if turn["role"] == "assistant"]
        for start, number in zip(starts, answers, strict=True):
            prompt = masks.prompt_ids(tokenizer, chat[:number])
            assert list(example.input_ids[:start]) == prompt
            direct = tokenizer.apply_chat_template(chat[:number], add_generation_prompt=True)["input_ids"]
            assert direct == prompt


def test_normalisation_does_not_reach_over_the_beginning_of_an_answer(tmp_path: Path) -> None:
    """The normalisation of step 1 joins letters and marks, and turns tabs into spaces."""
    from transformers import AutoTokenizer

    converted_sentencepiece(tmp_path, "unigram", normalization="nmt_nfkc")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = chat_template.build("### Human:", "### Assistant:")
    source = random.Random(9)
    chats = [random_conversation(source) for _ in range(200)]
    for chat in chats:
        chat[-1]["content"] = source.choice(["\u0301", "\u3099", "ﾞ", "½", "\u3000", "e\u0301"]) + chat[-1]["content"]
    for chat, example in zip(chats, masks.encode(tokenizer, [_conversation(chat) for chat in chats]), strict=True):
        assert (example.joined, example.ends_open) == (0, 0)
        start = [start for start, _, is_trained in masks.runs(example.labels) if is_trained][-1]
        assert list(example.input_ids[:start]) == masks.prompt_ids(tokenizer, chat[:-1])


def test_the_same_text_as_the_seeds(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": "B"},
    ]
    text = "S\n### Human: Q\n### Assistant: A</s>\n### Human: R\n### Assistant: B</s>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "S\n### Human: Q\n### Assistant:"


def test_japanese_templates_with_line_ends(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template.build("\n\n### 指示:\n", "\n\n### 応答:\n")
    chat = [{"role": "user", "content": '"Q" \\ {{ x }}'}, {"role": "assistant", "content": "答え🙂"}] * 2
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    turn = '### 指示:\n"Q" \\ {{ x }}\n\n### 応答:\n答え🙂</s>'
    assert text == f"{turn}\n\n{turn}"
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    assert _trained_texts(tokenizer, example) == ["答え🙂</s>"] * 2


def test_an_end_token_in_the_data_is_not_doubled(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A</s>"}]
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    assert _trained_texts(tokenizer, example) == [" A</s>"]


def test_an_answer_joined_to_its_prompt_is_counted(tokenizer_dirs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs["byte_level"])
    tokenizer.chat_template = chat_template.build("### Human: ", "### Assistant: ")  # the blank joins the first word
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    assert example.joined == 1
    assert _trained_texts(tokenizer, example) == [" the dog</s>"]


def test_a_template_without_end_token_is_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(" + eos_token", "")
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    assert example.ends_open == 1


def test_cutting_keeps_ids_and_labels_together(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "the cat sees a dog"}]
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    first = next(start for start, _, is_trained in masks.runs(example.labels) if is_trained)
    assert example.cut(first).trained == 0
    assert example.cut(first + 2).trained == 2
    assert example.cut(10_000) == example


def test_an_answer_that_loses_its_end_by_the_cut_is_open(tokenizer_dirs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs["byte_level"])
    tokenizer.chat_template = chat_template.build("### Human: ", "### Assistant: ")  # each answer begins joined
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "the cat sees a dog"}] * 2
    (example,) = masks.encode(tokenizer, [_conversation(chat)])
    (first, first_end), (second, second_end) = [(a, b) for a, b, is_trained in masks.runs(example.labels) if is_trained]
    told = {
        length: (example.cut(length).ends_open, example.cut(length).joined)
        for length in (first, first + 1, first_end - 1, first_end, second, second + 1, second_end)
    }
    assert told == {
        first: (0, 0),
        first + 1: (1, 1),
        first_end - 1: (1, 1),
        first_end: (0, 1),
        second: (0, 1),
        second + 1: (1, 2),
        second_end: (0, 2),
    }


def test_people_see_what_is_trained(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "見る。"}, {"role": "assistant", "content": "犬 [bold]x[/bold] 🙂"}] * 2
    examples = masks.encode(tokenizer, [_conversation(chat)])
    stream = io.StringIO()
    masks.print_examples(tokenizer, examples, stream=stream)
    trained = "[[ 犬 [bold]x[/bold] 🙂</s>]]"
    turn = f"### Human: 見る。\n### Assistant:{trained}"
    assert f"{turn}\n{turn}" in stream.getvalue()
    assert f"here, line 1: {len(examples[0].input_ids)} tokens, {examples[0].trained} trained" in stream.getvalue()


def test_a_terminal_gets_colours(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "cat"}]
    stream = io.StringIO()
    masks.print_examples(tokenizer, masks.encode(tokenizer, [_conversation(chat)]), stream=stream)
    assert "\x1b[1;32m cat</s>" in stream.getvalue()


class TestChoosingATemplate:
    def test_one_without_marks_is_replaced_and_said(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ messages }}"
        template, notice = chat_template.choose(
            tokenizer, instruction_template="### Human:", response_template="### Assistant:"
        )
        assert chat_template.marks_training(template)
        assert notice is not None and "replaced" in notice

    def test_one_with_marks_is_kept(self, tokenizer: Any) -> None:
        own = "{%- generation -%}{{ messages[-1]['content'] }}{%- endgeneration -%}"
        tokenizer.chat_template = own
        template, notice = chat_template.choose(tokenizer, instruction_template="U:", response_template="A:")
        assert template == own
        assert notice is not None and "own chat template is used" in notice

    def test_none_at_all_needs_no_notice(self, tokenizer: Any) -> None:
        tokenizer.chat_template = None
        _, notice = chat_template.choose(tokenizer, instruction_template="U:", response_template="A:")
        assert notice is None

    def test_bos_is_written_when_the_tokenizer_writes_it(self, tokenizer_dirs: dict[str, Path]) -> None:
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs["byte_level"])
        template, _ = chat_template.choose(tokenizer, instruction_template="U:", response_template="A:")
        assert "bos_token" not in template
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        template, _ = chat_template.choose(tokenizer, instruction_template="U:", response_template="A:")
        tokenizer.chat_template = template
        chat = [{"role": "user", "content": "Q"}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert asked[0] == 1 and asked.count(1) == 1
