"""YAML recipes with the seeds' sections (`model`, `lora`, `training`, `dataset`, `outputs`, ...) as our settings.

    flat, notes = translate({"lora": {"r": 4}, "training": {"learning_rate": 1e-4}}, fields=[...], where="recipe.yaml")

The sections are those of the configuration files of ABCI's workshops: what their scripts handed to `from_pretrained`,
`LoraConfig`, `TrainingArguments`, `EarlyStoppingCallback` and `load_dataset`:
https://github.com/ohtaman/abci-examples/tree/main/202310/config
"""

from __future__ import annotations

import difflib
import json
import os
import string
from collections.abc import Collection, Mapping
from typing import Any

from train.errors import refuse
from train.finetune import hub_data
from train.finetune import seed_recipe_keys as keys


def is_sectioned(given: Mapping[str, Any]) -> bool:
    """Whether a recipe is written in the seeds' sections."""
    return any(name in given for name in (*keys.SECTIONS, "input_template"))


def translate(
    given: Mapping[str, Any], *, fields: Collection[str], where: str, environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and what to tell the user of keys that have no effect.

    Args:
        given: the recipe as it was read.
        fields: the names of our settings. They may stand beside the sections, and in `training`.
        where: the recipe's name, for messages.
        environment: what `$USER` in `outputs.dirname` means.

    Raises:
        UserError: unknown keys, each with the nearest one; a section that is none; a value that cannot be had here.
    """
    work = _Translation(where, {}, [], [])
    known = [*keys.SECTIONS, "prompt_template", "input_template", *fields]
    for name in given:
        if name not in known:
            work.unknown(str(name), known)
        elif name in fields and name != "prompt_template":
            work.flat[name] = given[name]
    _translate_model_and_method(work, given)
    _translate_data(work, given)
    _translate_training(work, work.section(given, "training"), fields)
    _translate_outputs(work, given, environment)
    refuse(work.problems)
    return work.flat, work.notes


class _Translation:
    """What is gathered on the way."""

    def __init__(self, where: str, flat: dict[str, Any], notes: list[str], problems: list[str]) -> None:
        self.where, self.flat, self.notes, self.problems = where, flat, notes, problems

    def section(self, given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        value = given.get(name) or {}
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{self.where}: {name} is a section and holds settings, not {value!r}.")
        return {}

    def take(self, given: Mapping[str, Any], name: str, names: Mapping[str, str | None]) -> Mapping[str, Any]:
        """Takes over a section whose keys have other names here."""
        section = self.section(given, name)
        for key, value in section.items():
            ours = names.get(key)
            if key not in names:
                self.unknown(str(key), list(names), section=name)
            elif ours is not None:
                self.flat[ours] = value
            elif value and key in keys.WHY_NOT:
                self.note(f"{name}.{key}", keys.WHY_NOT[key])
        return section

    def note(self, key: str, why: str) -> None:
        self.notes.append(f"{self.where}: {key} has no effect: {why}")

    def unknown(self, key: str, known: Collection[str], section: str | None = None) -> None:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
        self.problems.append(f"{self.where}: {f'{section}.' if section else ''}{key} is not a setting; {hint}")


def _translate_model_and_method(work: _Translation, given: Mapping[str, Any]) -> None:
    work.take(given, "model", keys.MODEL)
    work.take(given, "finetuning", keys.FINETUNING)
    work.take(given, "early_stopping_callback", keys.EARLY_STOPPING)
    if "lora" not in given:
        return
    section = work.take(given, "lora", keys.LORA)
    work.flat["use_peft"] = True
    for key, only in (("bias", "none"), ("task_type", "CAUSAL_LM")):
        if section.get(key, only) != only:
            work.problems.append(f"{work.where}: lora.{key} {section[key]!r}: only {only} is to be had.")
    targets = section.get("target_modules")
    if isinstance(targets, str):
        work.flat["peft_target_modules"] = targets = [targets]
    if isinstance(targets, list):
        work.flat["peft_target_modules"] = [name for name in targets if name not in keys.NORMALISATIONS]
        for name in targets:
            if name in keys.NORMALISATIONS:
                work.note(f"lora.target_modules {name}", "a normalisation can have no adapter")


def _translate_training(work: _Translation, section: Mapping[str, Any], fields: Collection[str]) -> None:
    known = [*fields, *keys.TRAINING_NAMES, *keys.TO_TRL, *keys.STRATEGIES, *keys.TRAINING_ELSE]
    to_trl: list[str] = []
    for key, value in section.items():
        if key in keys.TO_TRL:
            to_trl.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        elif key in keys.TRAINING_NAMES or key in fields:
            work.flat[keys.TRAINING_NAMES.get(key, key)] = value
        elif key in keys.WHY_NOT and value:
            work.note(f"training.{key}", keys.WHY_NOT[key])
        elif key not in known:
            work.unknown(str(key), known, section="training")
    if to_trl:
        work.flat["trainer_arguments"] = [*to_trl, *work.flat.get("trainer_arguments", [])]
    _translate_report_to(work, section.get("report_to"))
    if section.get("load_best_model_at_end"):
        work.flat["keep_best"] = True
    if section.get("metric_for_best_model", "loss") not in ("loss", "eval_loss"):
        work.problems.append(f"{work.where}: training.metric_for_best_model: only eval_loss is compared.")
    _translate_strategies(work, section)


def _translate_report_to(work: _Translation, given: Any) -> None:
    """W&B is a setting here, and TensorBoard always on; others are not to be had."""
    names = [given] if isinstance(given, str) else given or []
    if "wandb" in names or "all" in names:
        work.flat["use_wandb"] = True
    for name in names:
        if name not in ("wandb", "tensorboard", "none", "all"):
            work.note(f"training.report_to {name}", "W&B and TensorBoard are to be had")


def _translate_strategies(work: _Translation, section: Mapping[str, Any]) -> None:
    evaluation = section.get("eval_strategy", section.get("evaluation_strategy"))
    saving = section.get("save_strategy")
    for name, value, allowed in (
        ("eval_strategy", evaluation, ("steps", "epoch", "no", False, None)),
        ("save_strategy", saving, ("steps", "no", False, None)),
    ):
        if value not in allowed:
            told = ", ".join(word for word in allowed if isinstance(word, str))
            work.problems.append(f"{work.where}: training.{name} {value!r}: one of {told} is to be had.")
    if evaluation == "epoch" or evaluation in ("no", False):  # YAML reads a bare no as false
        work.flat.pop("eval_steps", None)
    if saving in ("no", False):
        work.flat["save_steps"] = 0
    has_own = "eval_size" in work.flat or "eval_data_files" in work.flat
    if evaluation in ("no", False) and has_own:
        work.note("training.eval_strategy no", "held-out data that is named is evaluated; leave it out of the recipe")
    if evaluation in ("steps", "epoch") and not has_own:
        work.flat["eval_size"] = keys.HELD_OUT
    elif evaluation is None and not has_own:
        work.flat.pop("eval_steps", None)


def _translate_data(work: _Translation, given: Mapping[str, Any]) -> None:
    work.take(given, "data", keys.DATA)
    for ours in ("data_files", "eval_data_files"):
        if isinstance(work.flat.get(ours), str):
            work.flat[ours] = [work.flat[ours]]
    template = given.get("prompt_template", given.get("input_template"))
    if isinstance(template, Mapping):
        work.take({"prompt_template": template}, "prompt_template", keys.PROMPT)
    elif template is not None:
        work.flat["prompt_template"] = template
    dataset = work.take(given, "dataset", keys.DATASET)
    if not dataset:
        return
    path, files = dataset.get("path"), dataset.get("data_files")
    if files is not None and (path is None or path in keys.LOCAL_FORMATS):
        work.flat["data_files"] = [files] if isinstance(files, str) else files
    elif path is not None and files is None:
        configuration, split = dataset.get("name"), dataset.get("split")
        if hub_data.is_slice(str(split)):
            work.problems.append(f"{work.where}: dataset.split {split}: {hub_data.NO_SLICES}")
        named = f":{configuration}:{split or 'train'}" if configuration else f":{split}" if split else ""
        work.flat["data_files"] = [f"{path}{named}"]
    else:
        formats = " or ".join(keys.LOCAL_FORMATS)
        work.problems.append(
            f"{work.where}: dataset names {', '.join(dataset)}: path alone, or {formats} as path with data_files."
        )


def _translate_outputs(work: _Translation, given: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    section = work.take(given, "outputs", keys.OUTPUTS)
    folder = section.get("dirname")
    if not isinstance(folder, str):
        return
    try:
        work.flat["output_dir"] = string.Template(folder).substitute(environment)
    except KeyError as error:
        del work.flat["output_dir"]
        work.note("outputs.dirname", f"{folder} names {error.args[0]}, which is not set; --output_dir names the output")
    except ValueError:
        work.problems.append(f"{work.where}: outputs.dirname {folder!r} has a $ that begins no variable's name.")
