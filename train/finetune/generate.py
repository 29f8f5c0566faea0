"""Lets a model answer prompts, as its users will: chat template applied, stopping at the end token.

python scripts/step4_finetune_model/generate.py --model_name_or_path DIR --prompt "What does zip do?" --json

The parts are in `train.generate`: which model, files of prompts, drawing, the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.generate import model as models
from train.generate import prompts as prompt_files
from train.generate.decode import Drawing, decode
from train.generate.prompts import Prompt
from train.settings import LARGEST_SEED, setting


@dataclass(frozen=True)
class GenerateSettings:
    """Which model answers what, and how."""

    model_name_or_path: str = setting(help="model folder, adapter folder, or name on the Hub")
    adapter: str | None = setting(None, help="adapter folder or name (PEFT) on that model")
    prompt: str | None = setting(None, help="one prompt")
    prompt_file: Path | None = setting(
        None, help='a prompt a line: text, or in .jsonl and .json files an object with "prompt" or "messages"'
    )
    chat: bool = setting(False, help="talk in the terminal: /new forgets, /exit ends", flag_only=True)
    system_prompt: str | None = setting(None, help="system message before every conversation")
    raw: bool = setting(False, help="go on with the prompt as plain text, even when there is a chat template")
    max_new_tokens: int = setting(128, help="longest answer, in tokens")
    temperature: float = setting(0.0, help="0 always takes the likeliest token; higher is more varied")
    top_p: float = setting(1.0, help="draw among the likeliest tokens that together have this probability")
    top_k: int = setting(0, help="draw among this many likeliest tokens; 0 among all")
    num_beams: int = setting(1, help="answers followed side by side; the likeliest as a whole is given")
    repetition_penalty: float = setting(1.0, help="above 1 makes tokens that stood before less likely")
    seed: int = setting(42, help="random seed of each batch, for a temperature above 0")
    batch_size: int = setting(1, help="prompts answered at once")
    device: str = setting("auto", help="where to compute", choices=("auto", "cuda", "cpu"))
    precision: str = setting("stored", help="number format of the weights", choices=tuple(models.PRECISIONS))
    json: bool = setting(False, help="print a JSON object per prompt: prompt, answer, tokens, ended", flag_only=True)
    output_file: Path | None = setting(
        None, help="write the answers, a JSON object a line with the prompt's own keys, instead of printing them"
    )
    overwrite: bool = setting(False, help="replace an existing --output_file", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done", flag_only=True)

    def problems(self) -> Iterator[str]:
        if (self.prompt is not None) + (self.prompt_file is not None) + self.chat != 1:
            yield "name either --prompt or --prompt_file or --chat."
        if self.prompt is not None and not self.prompt.strip():
            yield "--prompt is blank: ask something."
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        for name in ("temperature", "top_k", "seed"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must not be negative."
        if self.seed > LARGEST_SEED:
            yield f"--seed {self.seed}: it must be at most {LARGEST_SEED}."
        if not 0 < self.top_p <= 1:
            yield f"--top_p {self.top_p}: it must be above 0 and at most 1."
        if self.repetition_penalty <= 0:
            yield f"--repetition_penalty {self.repetition_penalty}: it must be above 0; 1 changes nothing."
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            yield "--top_p and --top_k have no effect at --temperature 0: raise it, such as to 0.7."
        yield from self._combination_problems()

    def _combination_problems(self) -> Iterator[str]:
        if self.chat and self.num_beams > 1:
            yield f"--num_beams {self.num_beams}: --chat shows words as they are drawn, beams are chosen at the end."
        if self.raw and (self.chat or self.system_prompt is not None):
            yield "--raw leaves the chat template out, which --chat and --system_prompt need: drop one."
        if self.chat and (self.json or self.output_file is not None):
            yield "--chat is for the terminal: --json and --output_file need --prompt or --prompt_file."

    @property
    def drawing(self) -> Drawing:
        return Drawing(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        prompt: the question, as given.
        answer: the text, without special tokens and surrounding blanks.
        tokens: generated tokens, the end token included.
        ended: whether it stopped by itself.
    """

    prompt: str
    answer: str
    tokens: int
    ended: bool


def generate(settings: GenerateSettings) -> int:
    """Prints the model's answers in the order of the prompts, or writes them, or talks.

    Raises:
        UserError: the prompts, the model or the output are not as they must be.
    """
    if settings.dry_run:
        what = "the prompt" if settings.prompt is not None else f"each line of {settings.prompt_file}"
        what = "what is typed" if settings.chat else what
        print(f"would let {settings.model_name_or_path} answer {what}, at most {settings.max_new_tokens} tokens each")
        return 0
    if settings.chat:
        return _chat(settings)
    given = [Prompt(settings.prompt)] if settings.prompt is not None else []
    given = prompt_files.read(settings.prompt_file) if settings.prompt_file is not None else given
    found = answers(settings, given)
    if settings.output_file is not None:
        records = prompt_files.answered(given, found)
        count = prompt_files.write(settings.output_file, records, overwrite=settings.overwrite)
        print(f"wrote {settings.output_file}: {count:,} answers")
        return 0
    for answer in found:
        if settings.json:
            print(json.dumps(vars(answer), ensure_ascii=False), flush=True)
        else:
            print(answer.answer if len(given) == 1 else f"> {answer.prompt}\n{answer.answer}\n", flush=True)
    return 0


def answers(settings: GenerateSettings, prompts: Sequence[str | Prompt]) -> Iterator[Answer]:
    """Each prompt's answer, of the model that `settings` name.

    Raises:
        UserError: the model cannot be found or loaded, or a prompt leaves it no room to answer.
    """
    sources = models.find(settings.model_name_or_path, settings.adapter)
    model, tokenizer = models.load(sources, device=settings.device, precision=settings.precision)
    yield from answers_with(model, tokenizer, settings, prompts)


def answers_of(folder: Path, settings: GenerateSettings, prompts: Sequence[str]) -> Iterator[Answer]:
    """Each prompt's answer, of the model in `folder`. Uploads let a model speak with it too (`train.hub.prompt`).

    Raises:
        UserError: the model cannot be loaded, or a prompt is without tokens or leaves it no room to answer.
    """
    is_adapter = models.is_adapter(folder)
    sources = models.find(str(folder)) if is_adapter else models.Sources(folder)
    model, tokenizer = models.load(sources, device=settings.device, precision=settings.precision)
    yield from answers_with(model, tokenizer, settings, prompts)


def answers_with(
    model: Any, tokenizer: Any, settings: GenerateSettings, prompts: Sequence[str | Prompt]
) -> Iterator[Answer]:
    """Each prompt's answer, of a loaded model.

    Raises:
        UserError: a prompt is without tokens or leaves no room to answer; all of them are looked at first.
    """
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    positions = models.positions(model)
    ids = [prompt_ids(tokenizer, prompt, raw=settings.raw, system=settings.system_prompt) for prompt in asked]
    for number, one in enumerate(ids, start=1):
        if not one:
            raise UserError(f"prompt {number} has no tokens: ask something that the tokenizer can read.")
        if positions is not None and len(one) >= positions:
            raise UserError(f"prompt {number} has {len(one)} tokens, the model {positions} positions: shorten it.")
    ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    found = decode(model, ids, settings.drawing, ends=ends, pad_id=tokenizer.pad_token_id)
    for prompt, said in zip(asked, found, strict=True):
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        yield Answer(prompt.text, text, len(said), bool(said) and said[-1] in ends)


def prompt_ids(tokenizer: Any, prompt: str | Prompt, *, raw: bool, system: str | None = None) -> list[int]:
    """The ids a model is given: the chat template around the prompt, or the plain text as it was pretrained on.

    Raises:
        UserError: the model has no chat template for the messages or the system prompt that are given.
    """
    asked = Prompt(prompt) if isinstance(prompt, str) else prompt
    if raw or not tokenizer.chat_template:
        if asked.messages and not raw:
            raise UserError('the model has no chat template, so "messages" cannot be rendered: ask with "prompt".')
        if system is not None:
            raise UserError("--system_prompt: the model has no chat template that would take it: leave it out.")
        return list(tokenizer(asked.text)["input_ids"])
    from train.finetune.masks import prompt_ids as chat_ids

    return chat_ids(tokenizer, asked.turns(system))


def end_ids(of_model: int | list[int] | None, of_tokenizer: int | None) -> list[int]:
    """The tokens that end an answer: those the model's generation configuration names, and the tokenizer's."""
    named = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token_id for token_id in (*named, of_tokenizer) if token_id is not None})


def _chat(settings: GenerateSettings) -> int:
    import readline  # noqa: F401  gives input() its history

    from train.generate.chat import chat

    sources = models.find(settings.model_name_or_path, settings.adapter)
    model, tokenizer = models.load(sources, device=settings.device, precision=settings.precision)
    ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    chat(model, tokenizer, settings.drawing, ends=ends, system=settings.system_prompt)
    return 0
