"""Lets a model answer prompts, as its users will: chat template applied, stopping at the end token.

python scripts/step4_finetune_model/generate.py --model_name_or_path DIR --prompt "What does zip do?" --json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError, refuse
from train.finetune import inputs
from train.settings import setting


@dataclass(frozen=True)
class GenerateSettings:
    """Which model answers what, and how."""

    model_name_or_path: str = setting(help="model folder, or name on the Hub")
    prompt: str | None = setting(None, help="one prompt")
    prompt_file: Path | None = setting(None, help="UTF-8 text file with a prompt on each line")
    raw: bool = setting(False, help="go on with the prompt as plain text, even when there is a chat template")
    max_new_tokens: int = setting(128, help="longest answer, in tokens")
    temperature: float = setting(0.0, help="0 always takes the likeliest token; higher is more varied")
    seed: int = setting(42, help="random seed, for a temperature above 0")
    device: str = setting("auto", help="where to compute", choices=("auto", "cuda", "cpu"))
    json: bool = setting(False, help="print a JSON object per prompt: prompt, answer, tokens, ended", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done", flag_only=True)

    def problems(self) -> Iterator[str]:
        if (self.prompt is None) == (self.prompt_file is None):
            yield "name either --prompt or --prompt_file."
        if self.prompt is not None and not self.prompt.strip():
            yield "--prompt is blank: ask something."
        if self.max_new_tokens < 1:
            yield f"--max_new_tokens {self.max_new_tokens}: it must be at least 1."
        if self.temperature < 0:
            yield f"--temperature {self.temperature}: it must not be negative."


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
    """Prints the model's answers, in the order of the prompts."""
    if settings.dry_run:
        what = "the prompt" if settings.prompt is not None else f"each line of {settings.prompt_file}"
        print(f"would let {settings.model_name_or_path} answer {what}, at most {settings.max_new_tokens} tokens each")
        return 0
    prompts = _prompts(settings)
    for answer in answers(settings, prompts):
        if settings.json:
            print(json.dumps(vars(answer), ensure_ascii=False), flush=True)
        else:
            print(answer.answer if len(prompts) == 1 else f"> {answer.prompt}\n{answer.answer}\n", flush=True)
    return 0


def answers(settings: GenerateSettings, prompts: Sequence[str]) -> Iterator[Answer]:
    """Each prompt's answer, of the model that `settings` name.

    Raises:
        UserError: the model cannot be found or loaded, or a prompt leaves it no room to answer.
    """
    folder = inputs.find_model(settings.model_name_or_path, flag="--model_name_or_path")
    yield from answers_of(folder, settings, prompts)


def answers_of(folder: Path, settings: GenerateSettings, prompts: Sequence[str]) -> Iterator[Answer]:
    """Each prompt's answer, of the model in `folder`. Uploads let a model speak with it too (`train.hub.prompt`).

    Raises:
        UserError: the model cannot be loaded, or a prompt is without tokens or leaves it no room to answer.
    """
    import torch
    from transformers import set_seed

    from train.checkpoint import verify

    model, tokenizer = verify.load(folder)
    device = _device(settings.device, torch.cuda.is_available())
    model.to(device)
    positions = getattr(model.config, "max_position_embeddings", None)
    ends = _end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    for number, prompt in enumerate(prompts, start=1):
        ids = prompt_ids(tokenizer, prompt, raw=settings.raw)
        if not ids:
            raise UserError(f"prompt {number} has no tokens: ask something that the tokenizer can read.")
        if positions is not None and len(ids) >= positions:
            raise UserError(f"prompt {number} has {len(ids)} tokens, the model {positions} positions: shorten it.")
        room = settings.max_new_tokens if positions is None else min(settings.max_new_tokens, positions - len(ids))
        set_seed(settings.seed)
        input_ids = torch.tensor([ids], device=device)
        with torch.no_grad():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=room,
                do_sample=settings.temperature > 0,
                temperature=settings.temperature or None,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None),
                eos_token_id=ends or None,
            )
        said = output[0, len(ids) :].tolist()
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        yield Answer(prompt, text, len(said), bool(said) and said[-1] in ends)


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    """The ids a model is given: the chat template around the prompt, or the plain text as it was pretrained on."""
    if raw or not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    from train.finetune.masks import prompt_ids as chat_ids

    return chat_ids(tokenizer, [{"role": "user", "content": prompt}])


def _end_ids(of_model: int | list[int] | None, of_tokenizer: int | None) -> list[int]:
    """The tokens that end an answer: those the model's generation configuration names, and the tokenizer's."""
    named = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token_id for token_id in (*named, of_tokenizer) if token_id is not None})


def _prompts(settings: GenerateSettings) -> list[str]:
    if settings.prompt is not None:
        return [settings.prompt]
    assert settings.prompt_file is not None
    try:
        lines = settings.prompt_file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--prompt_file {settings.prompt_file} is not a file: check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {settings.prompt_file} is not UTF-8 ({error.reason}): convert it.") from None
    prompts = [line for line in lines if line.strip()]
    refuse([] if prompts else [f"--prompt_file {settings.prompt_file} has no prompt: write one a line."])
    return prompts


def _device(wanted: str, has_gpu: bool) -> str:
    if wanted == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU; use --device cpu.")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"
