"""The settings of `evaluate.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from train.evaluate.exact_match import NORMALISATIONS
from train.finetune.record_formats import AUTO, FORMATS
from train.generate.model import PRECISIONS
from train.settings import setting

_ASKED = ("squad_files", "question_files")
# What has an effect only beside one of the flags before it.
_NEEDS = (
    (
        ("text_files",),
        ("json_key", "on_error", "max_documents", "window", "stride", "document_start", "score_document_ends"),
    ),
    (("squad_files",), ("squad_prompt",)),
    (("question_files",), ("normalisation",)),
    (_ASKED, ("max_new_tokens", "stop_at", "raw", "data_format", "instruction_template", "response_template")),
    ((*_ASKED, "lm_eval_tasks"), ("max_questions",)),
    (("lm_eval_tasks",), ("lm_eval_num_fewshot",)),
)


@dataclass(frozen=True)
class EvaluateSettings:
    """Which model is measured at what."""

    model_name_or_path: str = setting(help="model folder, adapter folder, or name on the Hub")
    adapter: str | None = setting(None, help="adapter folder or name (PEFT) on that model")
    base_model: str | None = setting(None, help="a model to measure at the same, for a table of before and after")
    output_dir: Path | None = setting(
        None, help="folder for evaluation.json and the answers; the model's own folder, when one of our steps made it"
    )

    text_files: tuple[str, ...] = setting((), help="perplexity of these texts; each file or glob is a set of its own")
    json_key: str = setting("text", help="the key or column that holds the text")
    on_error: str = setting("stop", help="what a broken document does", choices=("stop", "skip"))
    max_documents: int = setting(0, help="documents of each set; 0 takes all")
    window: int | None = setting(None, help="tokens the model sees at once; as many as it has positions")
    stride: int | None = setting(None, help="tokens by which the window moves on; half the window")
    document_start: str = setting(
        "auto", help="token before each document; auto is bos where the tokenizer adds it, else what ends documents"
    )
    score_document_ends: bool = setting(False, help="predict the end of each document too")

    squad_files: tuple[Path, ...] = setting((), help="SQuAD's exact match and F1: its .json, or records of it")
    squad_prompt: str = setting(
        "{context}\\n\\nQ: {question}\\nA:", help="what a model without chat template is asked; \\n is a line end"
    )
    question_files: tuple[Path, ...] = setting((), help="exact match on questions and answers")
    normalisation: str = setting("blanks", help="of answers before they are compared", choices=NORMALISATIONS)
    max_questions: int = setting(0, help="questions of each file; 0 takes all")
    max_new_tokens: int = setting(64, help="longest answer, in tokens")
    stop_at: str | None = setting(None, help="an answer ends before this text; \\n is a line end")
    raw: bool = setting(False, help="ask without the chat template")
    data_format: str = setting(AUTO, help="form of the questions' records, by their keys", choices=(AUTO, *FORMATS))
    instruction_template: str = setting("### Human:", help="of llm-jp-sft texts, as in finetuning; \\n is a line end")
    response_template: str = setting("### Assistant:", help="of llm-jp-sft texts, as in finetuning; \\n is a line end")

    lm_eval_tasks: tuple[str, ...] = setting((), help="tasks of lm-evaluation-harness, where it is installed")
    lm_eval_num_fewshot: int | None = setting(None, help="examples before each question; as the task has it")

    batch_size: int = setting(8, help="texts or questions computed at once")
    device: str = setting("auto", help="where to compute", choices=("auto", "cuda", "cpu"))
    precision: str = setting("stored", help="number format of the weights", choices=tuple(PRECISIONS))
    dry_run: bool = setting(False, help="print what would be measured", flag_only=True)

    def problems(self) -> Iterator[str]:
        if not (self.text_files or self.squad_files or self.question_files or self.lm_eval_tasks):
            yield "nothing to measure: name --text_files, --squad_files, --question_files or --lm_eval_tasks."
        for name in ("batch_size", "max_new_tokens", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: it must be at least 1."
        for name in ("max_documents", "max_questions"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must not be negative; 0 takes all."
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            yield f"--stride {self.stride}: it must be below --window {self.window}, or a window begins without a past."
        if self.stop_at == "":
            yield "--stop_at is empty: name the text an answer ends before, or leave the flag out."
        if "{question}" not in self.squad_prompt:
            yield f"--squad_prompt {self.squad_prompt!r} has no {{question}}: add it."
        for name in ("instruction_template", "response_template"):
            if not getattr(self, name).strip():
                yield f"--{name} is empty: name the text that stands before each turn."
        for name in ("text_files", "squad_files", "question_files"):
            paths = [Path(given) for given in getattr(self, name)]
            twice = next((one for one in paths if paths.count(one) > 1), None)
            if twice is not None:
                yield f"--{name} names {twice} more than once: once is enough."
        yield from self._without_effect()

    def _without_effect(self) -> Iterator[str]:
        defaults = {one.name: one.default for one in fields(self)}
        for needed, names in _NEEDS:
            if any(getattr(self, one) for one in needed):
                continue
            beside = " or ".join(f"--{one}" for one in needed)
            for name in names:
                if getattr(self, name) != defaults[name]:
                    yield f"--{name} has no effect without {beside}: leave it out, or add that."
