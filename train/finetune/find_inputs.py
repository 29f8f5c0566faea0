"""Finds what a finetuning reads, and says at once all that is missing or cannot be had on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import verification
from train.cluster.allocation import Allocation
from train.errors import UserError, refuse
from train.finetune import base_model, lora, methods, sources, trainer_arguments
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found and checked."""

    model_dir: Path
    tokenizer_dir: Path
    sources: tuple[sources.Source, ...]
    eval_files: tuple[Path, ...]
    deepspeed: Path | None
    base_model_on_hub: bool

    @property
    def data_files(self) -> tuple[Path, ...]:
        return tuple(file for source in self.sources for file in source.files)

    def files(self) -> list[Path]:
        found = base_model.model_files(self.model_dir)
        if self.tokenizer_dir != self.model_dir:
            found += [self.tokenizer_dir / name for name in verification.TOKENIZER_FILES]
        found += [*self.data_files, *self.eval_files, *([self.deepspeed] if self.deepspeed is not None else [])]
        return [file for file in found if file.is_file()]


def find(settings: FinetuneSettings, folder: FinetuneFolder) -> Inputs:
    """Finds everything, and reports everything that is missing at once."""
    problems: list[str] = []

    def attempt(find: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return find(*arguments, **options)
        except UserError as error:
            problems.extend(error.problems)
            return None

    model_dir = attempt(_find_base, settings.model_name_or_path)
    tokenizer_dir = model_dir
    if settings.tokenizer_name_or_path is not None:
        name, flag = settings.tokenizer_name_or_path, "--tokenizer_name_or_path"
        tokenizer_dir = attempt(base_model.find_model, name, flag=flag, with_weights=False)
    data = attempt(sources.find_sources, settings.data_files, settings.data_weights, flag="--data_files")
    eval_files: tuple[Path, ...] = ()
    if settings.eval_data_files:
        eval_files = attempt(sources.find_data, settings.eval_data_files, flag="--eval_data_files")
    if settings.deepspeed is not None:
        problems.extend(_deepspeed_problems(settings.deepspeed))
    if model_dir is not None:
        problems.extend(methods.model_problems(settings, model_dir))
    problems.extend(trainer_arguments.problems(settings, folder))
    refuse(problems)
    is_on_hub = not Path(settings.model_name_or_path).is_dir()
    return Inputs(model_dir, tokenizer_dir, data, eval_files, settings.deepspeed, is_on_hub)


def check_machine(settings: FinetuneSettings, where: Allocation) -> None:
    """Refuses what this machine cannot do.

    Raises:
        UserError: a GPU or a package is missing, or there are too many processes.
    """
    problems = list(lora.machine_problems(settings))
    if settings.device_map is not None and where.world_size > 1:
        problems.append(
            f"--device_map {settings.device_map} spreads a model on one node: take one, or use --zero_stage 3."
        )
    if where.device == "cpu" and settings.fp16:
        problems.append("--fp16 needs a GPU, and there is none here: use --bf16, or neither.")
    if settings.use_flash_attention_2:
        from importlib.util import find_spec

        if where.device == "cpu" or find_spec("flash_attn") is None:
            problems.append(
                "--use_flash_attention_2 needs a GPU and the package flash-attn: install it, or leave it out."
            )
    if not settings.use_fast:
        print("--use_fast False: the fast tokenizer is used all the same; step 3 proves that it gives the same ids.")
    refuse(problems)


def _find_base(name: str) -> Path:
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"--model_name_or_path {name} is an adapter, a whole model was expected: merge it first, with "
            "scripts/step4_finetune_model/merge_adapter.sh."
        )
    return base_model.find_model(name, flag="--model_name_or_path")


def _deepspeed_problems(file: Path) -> Iterator[str]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        yield f"--deepspeed {file} cannot be read ({error}): name a DeepSpeed JSON file."
    except json.JSONDecodeError as error:
        yield f"--deepspeed {file} is not JSON ({error}): mend it, or use --zero_stage."
    else:
        if not isinstance(config, dict):
            yield f"--deepspeed {file} holds no JSON object: name a DeepSpeed configuration, or use --zero_stage."
        elif not isinstance(config.get("zero_optimization", {}), dict):
            yield f'--deepspeed {file}: zero_optimization is no JSON object; state it as {{"stage": 2}}.'
