"""Prompt templates by name: with an input, and without one where that is worded differently."""

from __future__ import annotations

_TAIL = "### Response:\n{output}"

# alpaca: https://github.com/tatsu-lab/stanford_alpaca#data-release, with a line end before the answer, as most users of
# the format write it. alpaca_ja: as in japanese-mistral-300m-recipe. dolly_ja: as in the seeds' YAML.
PRESETS: dict[str, tuple[str, str | None]] = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n" + _TAIL,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n" + _TAIL,
    ),
    "alpaca_ja": (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n"
        "[SEP]\n指示:\n{instruction}\n[SEP]\n入力:\n{input}\n[SEP]\n応答:\n{output}",
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n"
        "[SEP]\n指示:\n{instruction}\n[SEP]\n応答:\n{output}",
    ),
    "dolly_ja": ("### Instruction:\n{instruction}\n### Input:\n{input}\n" + _TAIL, None),
    "squad": ("{context}\n\nQ: {question}\nA: {answer}", None),
    "plain": ("{prompt}{completion}", None),
}
