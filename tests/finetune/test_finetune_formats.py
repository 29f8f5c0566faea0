"""For each form of a record, token by token: what is trained is the answer and its end token, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train.data.document_formats import BadDocumentError
from train.data.documents import Skipped
from train.errors import UserError
from train.finetune import masks, prompt_template
from train.finetune.conversations import Conversation, read_conversations
from train.finetune.prompt_template import PromptTemplate
from train.finetune.record_formats import FORMATS, Reading, detect, parse_record

TEXTS = {
    "english": ("What does the cat see?", "The cat sees a dog.", "a dog, 12,345 times"),
    "japanese": ("猫は何を見る？", "猫は犬を見る。", "犬を見る。東京"),
    "emoji": ("who 🙂?", "👩\u200d👩\u200d👧 see 🙂", "🙂👩\u200d👩\u200d👧"),
    "hard": (
        "### Response:\nnot {this}\n### Assistant: nor </s> this",
        "{{ x }} {% y %}\n\n### Input:",
        "### Human: {z}",
    ),
}
ALPACA_BOTH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{q}\n\n### Input:\n{c}\n\n### Response:\n"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{q}\n\n### Response:\n"
)
CHAT = "### Human: {q}\n### Assistant:"
# name, prompt template, the record of a question, a context and an answer; the prompt, and what precedes the answer
CASES: dict[str, tuple[str | None, Callable[[str, str, str], dict[str, Any]], str, str]] = {
    "messages": (
        None,
        lambda q, c, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        CHAT,
        " ",
    ),
    "messages under alpaca": (
        "alpaca",
        lambda q, c, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        ALPACA_ALONE,
        "",
    ),
    "sharegpt": (
        None,
        lambda q, c, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        CHAT,
        " ",
    ),
    "prompt and completion": (None, lambda q, c, a: {"prompt": q, "completion": a}, CHAT, " "),
    "prompt and completion, plain": ("plain", lambda q, c, a: {"prompt": q + "\n", "completion": a}, "{q}\n", ""),
    "alpaca": (
        "alpaca",
        lambda q, c, a: {"instruction": q, "input": c, "output": a, "text": "unused"},
        ALPACA_BOTH,
        "",
    ),
    "alpaca, empty input": (
        "alpaca",
        lambda q, c, a: {"instruction": q, "input": "", "output": a},
        ALPACA_ALONE,
        "",
    ),
    "alpaca in japanese": (
        "alpaca_ja",
        lambda q, c, a: {"instruction": q, "input": c, "output": a},
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n"
        "[SEP]\n指示:\n{q}\n[SEP]\n入力:\n{c}\n[SEP]\n応答:\n",
        "",
    ),
    "dolly": (
        "dolly_ja",
        lambda q, c, a: {"index": 0, "category": "qa", "instruction": q, "input": c, "output": a},
        "### Instruction:\n{q}\n### Input:\n{c}\n### Response:\n",
        "",
    ),
    "dolly, no input": (
        "dolly_ja",
        lambda q, c, a: {"instruction": q, "input": None, "output": a},
        "### Instruction:\n{q}\n### Response:\n",
        "",
    ),
    "dolly in english": (
        "dolly_ja",
        lambda q, c, a: {"instruction": q, "context": c, "response": a},
        "### Instruction:\n{q}\n### Input:\n{c}\n### Response:\n",
        "",
    ),
    "instruction in a chat": (
        None,
        lambda q, c, a: {"instruction": q, "input": c, "output": a},
        "### Human: {q}\n\n{c}\n### Assistant:",
        " ",
    ),
    "squad of the hub": (
        "squad",
        lambda q, c, a: {"title": "T", "context": c, "question": q, "answers": {"text": [a, "other"]}},
        "{c}\n\nQ: {q}\nA:",
        " ",
    ),
    "question and answer without context": (
        "squad",
        lambda q, c, a: {"question": q, "answer": a},
        "Q: {q}\nA:",
        " ",
    ),
    "squad in a chat": (
        None,
        lambda q, c, a: {"context": c, "question": q, "answers": [{"text": a, "answer_start": 0}]},
        "### Human: {c}\n\n{q}\n### Assistant:",
        " ",
    ),
    "jsquad by the seeds' template": (
        "タイトル: {title}\n\n文脈: {context}\n\n設問: {question}\n\n答え: {answer[text]}",
        lambda q, c, a: {"title": "猫", "context": c, "question": q, "answer": {"text": a, "answer_start": 0}},
        "タイトル: 猫\n\n文脈: {c}\n\n設問: {q}\n\n答え:",
        " ",
    ),
    "nemo's input and output": (
        "{input} {output}",
        lambda q, c, a: {"input": q, "output": a},
        "{q}",
        " ",
    ),
}


def _prompt(name: str | None) -> PromptTemplate | None:
    return None if name is None else PromptTemplate.parse(*prompt_template.find(name))


def _reading(name: str | None = None, data_format: str = "auto") -> Reading:
    return Reading("### Human:", "### Assistant:", _prompt(name), data_format)


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answer_and_its_end_token_are_trained(
    case: str, texts: tuple[str, str, str], tokenizer: Any
) -> None:
    name, make, prompt, gap = CASES[case]
    question, context, answer = texts
    template = _prompt(name)
    if template is not None:
        tokenizer.chat_template = template.chat_template()
    _, messages = parse_record(make(question, context, answer), _reading(name))
    (example,) = masks.encode(tokenizer, [Conversation("here", messages)])

    asked = prompt.replace("{q}", "\0").replace("{c}", context).replace("\0", question)
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{asked}{gap}{answer}</s>", add_special_tokens=False)["input_ids"]
    assert list(example.input_ids) == whole
    assert list(example.labels) == [masks.IGNORED] * len(before) + whole[len(before) :]
    assert example.labels[-1] == tokenizer.eos_token_id
    assert (example.joined, example.ends_open) == (0, 0)
    conversation = Conversation("here", messages[:-1])
    assert masks.prompt_ids(tokenizer, conversation.as_dicts()) == before  # what a model is asked with


def test_a_text_of_llm_jp_sft_token_by_token(tokenizer: Any) -> None:
    """Not among the cases: such a text is split at its templates, which its questions so cannot hold."""
    for question, _, answer in (TEXTS[name] for name in ("english", "japanese", "emoji")):
        _, messages = parse_record({"text": f"### Human: {question}### Assistant: {answer}</s>"}, _reading())
        (example,) = masks.encode(tokenizer, [Conversation("here", messages)])
        before = tokenizer(f"### Human: {question}\n### Assistant:", add_special_tokens=False)["input_ids"]
        rest = list(example.input_ids[len(before) :])
        assert list(example.labels) == [masks.IGNORED] * len(before) + rest
        assert tokenizer.decode(rest).strip() == f"{answer}</s>"


@pytest.mark.parametrize("case", CASES)
def test_people_see_what_is_trained_in_each_form(case: str, tokenizer: Any) -> None:
    name, make, _, gap = CASES[case]
    template = _prompt(name)
    if template is not None:
        tokenizer.chat_template = template.chat_template()
    question, context, answer = TEXTS["japanese"]
    _, messages = parse_record(make(question, context, answer), _reading(name))
    stream = io.StringIO()
    masks.print_examples(tokenizer, masks.encode(tokenizer, [Conversation("here", messages)]), stream=stream)
    assert stream.getvalue().count("[[") == 2 and f"[[{gap}{answer}</s>]]" in stream.getvalue()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"instruction": "", "output": "", "text": ""}, "instruction"),
        ({"input": "", "output": ""}, "instruction"),
        ({"instruction": "", "context": "", "response": ""}, "instruction"),
        ({"question": "", "context": "", "answers": []}, "squad"),
        ({"question": "", "answer": ""}, "squad"),
        ({"text": ""}, "text"),
    ],
)
def test_the_keys_tell_the_format(record: dict[str, Any], expected: str) -> None:
    assert detect(record) == expected and expected in FORMATS


def test_a_format_can_be_forced() -> None:
    record = {"instruction": "Q", "output": "A", "text": "### Human: R### Assistant: B"}
    assert parse_record(record, _reading())[1][0].content == "Q"
    assert parse_record(record, _reading(data_format="text"))[1][0].content == "R"
    with pytest.raises(
        BadDocumentError, match=r"not of the form squad, which --data_format forces \(keys: 'instruction'"
    ):
        parse_record(record, _reading(data_format="squad"))


USERS = [
    # record, prompt template, the question and its further fields
    ({"instruction": "", "input": "only", "output": "A"}, "dolly_ja", "only", {}),
    ({"input": "only", "output": "A"}, "dolly_ja", "only", {}),
    ({"instruction": "Q", "input": " ", "output": "A"}, "dolly_ja", "Q", {}),
    ({"question": "Q", "answer": "A", "input": "not this"}, "squad", "Q", {}),
    ({"question": "Q", "context": "C", "answer": "A", "input": "not this"}, "squad", "Q", {"input": "C"}),
    ({"prompt": "Q", "input": "C", "completion": "A"}, "{prompt} {input} {output}", "Q", {"input": "C"}),
    ({"instruction": "Q", "category": "C", "output": "A"}, "{category} {instruction}", "Q", {"category": "C"}),
    ({"instruction": "Q", "category": None, "output": "A"}, "{category} {instruction}", "Q", {}),
    ({"instruction": "Q", "system": "S", "output": "A"}, "{system} {instruction}", "Q", {"system": "S"}),
]


@pytest.mark.parametrize(("record", "template", "question", "fields"), USERS)
def test_each_text_of_a_record_has_one_place(
    record: dict[str, Any], template: str, question: str, fields: dict[str, str]
) -> None:
    user, _ = parse_record(record, _reading(template))[1]
    assert (user.role, user.content, dict(user.fields)) == ("user", question, fields)


BAD_RECORDS = [
    ({"instruction": "Q", "output": " "}, None, "message 2, by assistant, is empty"),
    ({"instruction": "", "input": "", "output": "A"}, "dolly_ja", "message 1, by user, is empty"),
    ({"instruction": 7, "output": "A"}, None, "key 'instruction' holds a number"),
    ({"instruction": "Q", "input": ["x"], "output": "A"}, None, "key 'input' holds an array"),
    ({"instruction": "Q", "input": "C", "output": "A"}, "Q: {instruction} A:", "its input would be left out"),
    ({"instruction": "Q", "input": "C", "output": "A"}, "{input} {output}", "its instruction would be left out"),
    ({"instruction": "Q", "output": "A"}, "{title} {instruction}", r"no key 'title', which --prompt_template names"),
    ({"question": "Q", "answers": []}, "squad", "its question has no answer"),
    ({"question": "Q", "answers": {"text": []}}, "squad", "its question has no answer"),
    ({"question": "Q", "answers": [3]}, "squad", "its answer holds a number"),
    ({"question": "Q", "answers": {}}, "squad", "its answer holds null"),
]


@pytest.mark.parametrize(("record", "template", "message"), BAD_RECORDS)
def test_what_cannot_be_trained_on(record: Any, template: str | None, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse_record(record, _reading(template))


NESTED = {
    "version": "v2.0",
    "data": [
        {
            "title": "猫",
            "paragraphs": [
                {
                    "context": "The cat sees a dog.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "The cat", "answer_start": 0}]},
                        {"id": "2", "question": "Whom?", "answers": [{"text": "a dog", "answer_start": 13}]},
                        {"id": "3", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_files(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "train-v2.0.json"
    file.write_text(json.dumps(NESTED, indent=indent))
    skipped = Skipped()
    found = list(read_conversations([file], _reading("squad"), on_error="skip", skipped=skipped))
    assert [(item.messages[0].content, item.messages[1].content) for item in found] == [
        ("Who?", "The cat"),
        ("Whom?", "a dog"),
    ]
    assert dict(found[0].messages[0].fields) == {"input": "The cat sees a dog."}
    assert found[1].place.endswith("article 1, paragraph 1, question 2") and found[1].format == "squad"
    assert skipped.count == 1 and "question 3: its question has no answer" in skipped.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": [3]}, "article 1: no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, "article 1, paragraph 1: no list 'qas'"),
        ({"data": [{"paragraphs": [{"qas": ["x"]}]}]}, "question 1: its question is not an object"),
        (
            {"instruction": "Q", "output": "A"},
            "one JSON object, a list of records or a record per line is expected",
        ),
    ],
)
def test_one_object_that_is_no_squad_file(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(content, indent=1))
    with pytest.raises(UserError, match=message):
        list(read_conversations([file], _reading("squad"), on_error="stop", skipped=Skipped()))


def test_arrow_files_are_read_as_the_datasets_library_keeps_them(tmp_path: Path) -> None:
    import datasets

    record = {"instruction": "Q", "input": "", "output": "A"}
    source = tmp_path / "source.json"
    source.write_text(json.dumps([record] * 3))
    kept: Any = datasets.load_dataset("json", data_files=str(source), cache_dir=str(tmp_path / "cache"), split="train")
    (file,) = [Path(entry["filename"]) for entry in kept.cache_files]
    found = list(read_conversations([file], _reading(), on_error="stop", skipped=Skipped()))
    assert [(item.format, item.messages[0].content) for item in found] == [("instruction", "Q")] * 3
    assert found[2].place.endswith("row 3")
    damaged = tmp_path / "damaged.arrow"
    damaged.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(UserError, match="is not a whole Arrow file"):
        list(read_conversations([damaged], _reading(), on_error="stop", skipped=Skipped()))


@pytest.mark.slow
def test_what_was_trained_by_a_prompt_template_is_answered_by_it(
    base_model: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """Two sources, by weight; asked with the saved chat template, the context beside the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [("cat", "tac"), ("dog", "god"), ("猫", "犬"), ("🙂", "空")]
    squad = [
        {"context": f"{word} is {answer}.", "question": f"what is {word}?", "answers": {"text": [answer]}}
        for word, answer in pairs
    ]
    alone = [{"question": "who?", "answer": "me 🙂"}]
    changes = {
        "model_name_or_path": base_model,
        "data_files": [str(write_jsonl(squad, "squad.jsonl")), str(write_jsonl(alone, "alone.jsonl"))],
        "data_weights": ["3", "2"],
        "prompt_template": "squad",
        "output_dir": tmp_path / "out",
        "max_seq_length": 128,
        "device": "cpu",
        "max_steps": 150,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 5,
    }
    assert call(*argv(changes)) == 0
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert [(source["examples"], source["taken"]) for source in results["examples"]["sources"]] == [(4, 3), (1, 2)]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    learnt = 0
    for record in [*squad, *alone]:
        message = {"role": "user", "content": record["question"], "input": record.get("context", "")}
        ids: Any = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            said = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        answer = record["answers"]["text"][0] if "answers" in record else record["answer"]
        learnt += tokenizer.decode(said) == f"{answer}</s>" or tokenizer.decode(said) == f" {answer}</s>"
    assert learnt >= 4  # by weight, one of the four was not taken
