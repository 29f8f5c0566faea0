"""One YAML for steps 1 to 5: a section of flags for each step, and what one step hands to the next filled in.

    output_dir: output/small          # job scripts and logs
    job: {queue: gpu, wall_time: "12:00:00", job_nodes: 2, job_gpus_per_node: 8}     # of the steps that train
    cpu_job: {queue: cpu}             # of the others; queue, account, notify, wall time are those of `job` if not said
    train_tokenizer: {input: corpus/*.jsonl, model_prefix: output/small/tokenizer/small, vocab_size: 32000}
    pretrain_model: {recipe: gpt_0.125B, output_model_dir: output/small/pretrained, job: {num_jobs: 4}}

A step without a section is left out. Sections are checked all at once, by the very settings of the steps' launchers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import hand_overs
from train import settings as settings_module
from train.checkpoint.convert import ConvertSettings
from train.cluster.settings import SubmitSettings
from train.data.documents import expand_inputs
from train.data.preprocess import PreprocessSettings
from train.errors import UserError, refuse
from train.finetune.settings import FinetuneSettings
from train.hub.upload import UploadSettings
from train.recipe import PretrainRecipe
from train.tokenizer.train import TrainTokenizerSettings

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# What belongs to one call: a chain that is started again would start everything again.
_ONE_CALL = ("dry_run", "overwrite", "rehearse", "resume", "submit", "after_job")
_SHARED_JOB = ("queue", "account", "notify", "wall_time")  # what cpu_job takes over from job


@dataclass(frozen=True)
class Kind:
    """A step: its section's name, its launcher, its settings, and whether it trains (and so takes nodes and GPUs)."""

    name: str
    script: str
    settings: type[Any]
    trains: bool = False

    @property
    def recipe_dir(self) -> Path | None:
        return (SCRIPTS / self.script).parent / "recipes" if self.trains else None


KINDS = (
    Kind("train_tokenizer", "step1_train_tokenizer/train_sentencepiece_tokenizer.py", TrainTokenizerSettings),
    Kind("preprocess_data", "step2_pretrain_model/preprocess_data.sh", PreprocessSettings),
    Kind("pretrain_model", "step2_pretrain_model/pretrain.sh", PretrainRecipe, trains=True),
    Kind(
        "convert_model",
        "step3_upload_pretrained_model/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh",
        ConvertSettings,
    ),
    Kind(
        "upload_pretrained_model",
        "step3_upload_pretrained_model/upload_tokenizer_and_pretrained_model_to_huggingface_hub.py",
        UploadSettings,
    ),
    Kind("finetune_model", "step4_finetune_model/finetune.sh", FinetuneSettings, trains=True),
    Kind(
        "upload_finetuned_model",
        "step5_upload_finetuned_model/upload_tokenizer_and_finetuned_model_to_huggingface_hub.py",
        UploadSettings,
    ),
)


@dataclass(frozen=True)
class Step:
    """A step that is ready to run.

    Attributes:
        kind: which one.
        flags: its flags by name, as given and as handed over.
        settings: what they mean.
        job: what it asks of a scheduler.
    """

    kind: Kind
    flags: Mapping[str, Any]
    settings: Any
    job: SubmitSettings

    @property
    def words(self) -> list[str]:
        return as_words(self.flags)


@dataclass(frozen=True)
class StepRecipe:
    """The steps in order, and the folder for their job scripts and logs."""

    steps: tuple[Step, ...]
    output_dir: Path


def read(file: Path) -> StepRecipe:
    """Reads and checks the whole file.

    Raises:
        UserError: the problems of all sections.
    """
    given = settings_module.read_yaml(file)
    names = [kind.name for kind in KINDS]
    known = {"output_dir", "job", "cpu_job", *names}
    found = [f"{file}: {key} is no step; there are {', '.join(names)}." for key in given if key not in known]
    sections = ("job", "cpu_job", *names)
    wrong = [name for name in sections if not isinstance(given.get(name) or {}, Mapping)]
    found += [f"{file}: {name} is a section and holds flags, not {given[name]!r}." for name in wrong]
    if not any(name in given for name in names):
        found.append(f"{file}: it has no step; there are {', '.join(names)}.")
    refuse(found)
    steps: list[Step] = []
    parsed: dict[str, Any] = {}
    for kind in KINDS:
        if kind.name not in given:
            continue
        own = dict(given[kind.name] or {})
        own_job = own.pop("job", None) or {}
        flags = {**own, **{name: value for name, value in hand_overs.find(kind.name, parsed) if name not in own}}
        parsed[kind.name] = None
        try:
            steps.append(_step(kind, flags, given, own_job))
            parsed[kind.name] = steps[-1].settings
        except UserError as error:
            found += [f"{kind.name}: {problem}" for problem in error.problems]
    refuse(found)
    return StepRecipe(tuple(steps), Path(given.get("output_dir") or Path("output") / file.stem).absolute())


def missing_inputs(recipe: StepRecipe) -> Iterator[str]:
    """Text, conversations and tokenizers that are not there. What an earlier step makes is not asked for."""
    is_made = any(step.kind.name == "train_tokenizer" for step in recipe.steps)
    for step in recipe.steps:
        try:
            if step.kind.name in ("train_tokenizer", "preprocess_data") and step.settings.input:
                expand_inputs(step.settings.input)
            if isinstance(step.settings, FinetuneSettings) and step.settings.data_files:
                expand_inputs(step.settings.data_files)
        except UserError as error:
            yield from (f"{step.kind.name}: {problem}" for problem in error.problems)
        data = getattr(step.settings, "data", step.settings)
        tokenizer = getattr(data, "input_tokenizer_file", None)
        if tokenizer is not None and not is_made and not tokenizer.is_file():
            yield f"{step.kind.name}: --input_tokenizer_file {tokenizer}: there is no such file."


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"--{name}={value}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def _step(kind: Kind, flags: Mapping[str, Any], given: Mapping[str, Any], own_job: Mapping[str, Any]) -> Step:
    """One step, checked.

    Raises:
        UserError: its flags or its job's are wrong.
    """
    found = [f"{name} belongs to one call, not to a recipe: leave it out." for name in _ONE_CALL if name in flags]
    found += [f"--{name} holds a section, not a value." for name, value in flags.items() if isinstance(value, Mapping)]
    refuse(found)
    parsed = settings_module.parse(
        kind.settings, as_words(flags), program=kind.name, description="", recipe_dir=kind.recipe_dir
    )
    if isinstance(parsed, PretrainRecipe):
        parsed = parsed.resolved()
    shared = dict(given.get("job") or {})
    if kind.trains:
        said = {name: value for name, value in settings_module.to_plain(parsed.job).items() if value != _DEFAULTS[name]}
        wanted = {**shared, **said, **own_job}
    else:
        taken_over = {name: value for name, value in shared.items() if name in _SHARED_JOB}
        wanted = {"save_margin_min": 0, **taken_over, **(given.get("cpu_job") or {}), **own_job}
    job = settings_module.build(SubmitSettings, wanted)
    return Step(kind, flags, dataclasses.replace(parsed, job=job) if kind.trains else parsed, job)


_DEFAULTS = settings_module.to_plain(SubmitSettings())
