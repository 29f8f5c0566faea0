"""Step 4's launch: check everything, prepare the examples, train, prove what came out, give it its name.

    finetune(settings.parse(FinetuneSettings, argv, ...))

Called again after an interruption, it goes on from the last whole checkpoint; when all is done it says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outcome, outputs, same_run
from train import settings as settings_module
from train.checkpoint import lineage, verification
from train.cluster import allocation as allocations
from train.cluster import launch
from train.cluster.allocation import Allocation
from train.cluster.ranks import rank_argv, rank_environment
from train.deepspeed_ops import remove_stale_locks
from train.errors import UserError, refuse
from train.finetune import data_settings, deepspeed_config, inputs, lora, methods, proof, trainer_arguments
from train.finetune.account import Account
from train.finetune.folder import FinetuneFolder, Plan
from train.finetune.settings import FinetuneSettings
from train.monitor import progress, wandb_run
from train.process import Command

STEP = "finetune_model"
_LAUNCHER = Path(__file__).resolve().parents[2] / "scripts" / "step4_finetune_model" / "finetune.sh"


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, found and checked."""

    model_dir: Path
    tokenizer_dir: Path
    sources: tuple[inputs.Source, ...]
    eval_files: tuple[Path, ...]
    deepspeed: Path | None
    base_model_on_hub: bool

    @property
    def data_files(self) -> tuple[Path, ...]:
        return tuple(file for source in self.sources for file in source.files)

    def files(self) -> list[Path]:
        found = inputs.model_files(self.model_dir)
        if self.tokenizer_dir != self.model_dir:
            found += [self.tokenizer_dir / name for name in verification.TOKENIZER_FILES]
        found += [*self.data_files, *self.eval_files, *([self.deepspeed] if self.deepspeed is not None else [])]
        return [file for file in found if file.is_file()]


def finetune(settings: FinetuneSettings) -> int:
    """Finetunes `settings.model_name_or_path` into `settings.output_dir`, or with --dry_run prints what would run.

    Raises:
        UserError: an input, a setting or the machine does not allow it; nothing was started then.
        NonFiniteLossError: the loss became NaN or infinite.
        VerificationError: what was saved is not what was trained.
    """
    started = time.time()  # the time budget counts from here
    settings = settings.with_line_ends()
    folder = FinetuneFolder(settings.output_dir.absolute())
    if settings.job.submit is not None:
        return _submit(settings, folder)
    where = allocations.find(settings.cluster, num_processes=_processes(settings), device=settings.device)
    if settings.dry_run:
        return _dry_run(settings, where, folder)
    found = _find_inputs(settings, folder)
    plain = _plain(settings)
    if folder.output.is_file():
        raise UserError(f"--output_dir {folder.output} is a file, a folder name was expected: choose another output.")
    if not settings.overwrite and manifest.is_done(folder.output, step=STEP, settings=plain, inputs=found.files()):
        verification.require(folder.output, hash_files=False)
        print(f"{folder.output} is there for the same settings and inputs: nothing to do (--overwrite trains again).")
        shutil.rmtree(folder.root, ignore_errors=True)
        return 0
    if folder.output.is_dir() and any(folder.output.iterdir()) and not settings.overwrite:
        raise UserError(
            f"--output_dir {folder.output} exists already: pass --overwrite to replace it, or choose another."
        )
    folder.refuse_foreign_output()
    _check_machine(settings, where)
    with _claimed(folder):
        identity = _identity(plain, found, where)
        resume_from = _begin(settings, folder, identity)
        account, eval_account, plan = _prepare(settings, found, where, folder, resume_from)
        outputs.write_text(folder.identity, json.dumps(identity, indent=2) + "\n")  # from here on one can go on with it
        _train(plan, where, folder, began=started)
        checks = proof.prove(plan, folder)
        folder.add_records()
        results = _results(settings, found, where, account, eval_account, checks, folder)
        for model_dir, proven in ((folder.model_dir, checks), *_merged(plan, folder)):
            verification.write(model_dir, proven)
            manifest.write(
                model_dir / manifest.FILE_NAME,
                step=STEP,
                settings=plain,
                inputs=found.files(),
                results=results | {"parameters": proven["weights"]["parameters"]},
                started=started,
            )
        folder.publish()
    print(f"loss {results['first_loss']:.4f} -> {results['last_loss']:.4f} in {results['steps']:,} steps")
    print(f"wrote {folder.output}")
    for run in sorted(folder.output.glob("wandb/offline-run-*")):
        print(f"W&B offline run: wandb sync {run}")
    return 0


def _submit(settings: FinetuneSettings, folder: FinetuneFolder) -> int:
    """Hands the run to a scheduler, once all that can be known here is known to fit."""
    from train.cluster import submit
    from train.cluster.job_folder import JobFolder

    where = allocations.of_job(settings.job, num_processes=_processes(settings), device=settings.device)
    print(f"where: {where.reason}")
    print(f"batch: {_layout(settings, where)}")
    if not settings.dry_run:
        _find_inputs(settings, folder)
    first = [
        *(["--overwrite"] if settings.overwrite else []),
        *(["--resume", "never"] if settings.resume == "never" else []),
    ]
    return submit.submit(
        _LAUNCHER,
        settings_module.to_yaml(settings),
        settings.job,
        JobFolder.of_finetuning(folder.output),
        cluster=settings.cluster,
        first_arguments=first,
        dry_run=settings.dry_run,
    )


def _processes(settings: FinetuneSettings) -> int:
    """Processes on each node; a model that is spread over the GPUs has one."""
    return 1 if settings.device_map is not None else settings.num_processes


def _merged(plan: Plan, folder: FinetuneFolder) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The merged model's folder and its checks, if it was asked for."""
    if plan.finetune.merge:
        from train.finetune.merge import merge

        yield folder.merged_dir, merge(plan.model_dir, folder.model_dir, folder.merged_dir)


def _plain(settings: FinetuneSettings) -> dict[str, Any]:
    """What is trained, without how its nodes are reached: that may change between two calls that mean the same run."""
    return {name: value for name, value in settings_module.to_plain(settings).items() if name not in ("cluster", "job")}


def build_command(settings: FinetuneSettings, where: Allocation, folder: FinetuneFolder) -> Command:
    """What every rank runs on `where`."""
    argv = [*rank_argv("train.finetune.worker"), "--output_dir", str(folder.output)]
    environment = rank_environment(where, extensions_dir=folder.extensions_dir)
    environment["HF_HUB_OFFLINE"] = "1"  # all is here by now; ranks need not ask
    is_one = where.world_size == 1 and settings.device_map is None
    if where.device == "cuda" and is_one and "CUDA_VISIBLE_DEVICES" not in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = "0"  # else the trainer would spread one process over all GPUs
    files = {}
    if settings.zero_stage:
        rendered = deepspeed_config.build(settings.zero_stage, device=where.device, offload=settings.offload)
        files[folder.deepspeed_config] = json.dumps(rendered, indent=2) + "\n"
    return Command(tuple(argv), environment, files=files)


def _launch_plan(
    settings: FinetuneSettings,
    where: Allocation,
    folder: FinetuneFolder,
    model_dir: Path | None = None,
    *,
    began: float | None = None,
) -> launch.Plan:
    """The launch on all nodes. One process without DeepSpeed is a plain one, which knows of no ranks."""
    return launch.plan(
        build_command(settings, where, folder),
        where,
        settings.cluster,
        launch_dir=folder.launch_dir,
        job_name=str(folder.output),
        paths=[folder.root, *([model_dir] if model_dir is not None else [])],
        is_distributed=where.world_size > 1 or _deepspeed_file(settings, folder) is not None,
        began=began,
    )


def _dry_run(settings: FinetuneSettings, where: Allocation, folder: FinetuneFolder) -> int:
    command = build_command(settings, where, folder)
    print(f"where: {where.reason}")
    print(f"batch: {_layout(settings, where)}")
    print(f"output: {folder.output}")
    for file, text in command.files.items():
        print(f"\n# {file}\n{text.rstrip()}")
    print(f"\n{_launch_plan(settings, where, folder).text()}")
    return 0


def _layout(settings: FinetuneSettings, where: Allocation) -> str:
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    return (
        f"{micro * accumulation * where.world_size} examples per step = {micro} per process x {where.world_size} "
        f"processes x {accumulation} accumulation steps"
    )


def _deepspeed_file(settings: FinetuneSettings, folder: FinetuneFolder) -> Path | None:
    """What the ranks read: made for --zero_stage, or a copy of --deepspeed, which may be edited in the meantime."""
    return folder.deepspeed_config if settings.deepspeed is not None or settings.zero_stage else None


def _find_inputs(settings: FinetuneSettings, folder: FinetuneFolder) -> _Inputs:
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
        tokenizer_dir = attempt(inputs.find_model, name, flag=flag, with_weights=False)
    sources = attempt(inputs.find_sources, settings.data_files, settings.data_weights, flag="--data_files")
    eval_files: tuple[Path, ...] = ()
    if settings.eval_data_files:
        eval_files = attempt(inputs.find_data, settings.eval_data_files, flag="--eval_data_files")
    if settings.deepspeed is not None:
        problems.extend(_deepspeed_problems(settings.deepspeed))
    if model_dir is not None:
        problems.extend(methods.model_problems(settings, model_dir))
    problems.extend(trainer_arguments.problems(settings, folder))
    refuse(problems)
    is_on_hub = not Path(settings.model_name_or_path).is_dir()
    return _Inputs(model_dir, tokenizer_dir, sources, eval_files, settings.deepspeed, is_on_hub)


def _find_base(name: str) -> Path:
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"--model_name_or_path {name} is an adapter, a whole model was expected: merge it first, with "
            "scripts/step4_finetune_model/merge_adapter.sh."
        )
    return inputs.find_model(name, flag="--model_name_or_path")


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


def _check_machine(settings: FinetuneSettings, where: Allocation) -> None:
    problems = list(lora.machine_problems(settings, where.device))
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


def _with_wandb_group(settings: FinetuneSettings) -> FinetuneSettings:
    """Names the W&B group here, once, so that all nodes land in the same one."""
    if not settings.use_wandb or settings.wandb_group:
        return settings
    name = Path(settings.model_name_or_path).name
    return dataclasses.replace(settings, wandb_group=wandb_run.group_name("finetune", name, socket.gethostname()))


def _identity(plain: Mapping[str, Any], found: _Inputs, where: Allocation) -> dict[str, Any]:
    """What makes a run this run and no other. Another number of processes cannot go on with its checkpoints."""
    files = {str(file): manifest.identity(file) for file in found.files()}
    record = {"settings": dict(plain), "inputs": files, "processes": where.world_size, "device": where.device}
    return dict(json.loads(json.dumps(record)))


@contextlib.contextmanager
def _claimed(folder: FinetuneFolder) -> Iterator[None]:
    """Keeps a second launch with the same output away."""
    with same_run.claimed(folder.root / "lock", str(folder.output)):
        try:
            yield
        finally:
            if folder.root.is_dir() and not folder.is_unfinished():  # nothing worth going on with
                shutil.rmtree(folder.root)


def _begin(settings: FinetuneSettings, folder: FinetuneFolder, identity: dict[str, Any]) -> Path | None:
    """Starts anew or goes on: the checkpoint to go on from, or None.

    Raises:
        UserError: the checkpoints of a run with other settings or inputs are in the way.
    """
    former = folder.former_identity() if settings.resume == "auto" else None
    differences = [] if former is None else list(same_run.differences(former, identity))
    if differences and folder.checkpoint() is not None:
        told = (f"{_difference_name(keys)} ({before!r}, now {now!r})" for keys, before, now in differences)
        raise UserError(
            f"{folder.output} has an unfinished run that differs in {'; '.join(told)}: use what it used, or "
            "pass --resume never to start again."
        )
    if former is None or differences:  # without a checkpoint nothing is lost: the setting that failed was mended
        for path in folder.root.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.outcome.unlink(missing_ok=True)
    shutil.rmtree(folder.model_dir, ignore_errors=True)
    checkpoint = folder.checkpoint()
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    progress.cut_after(folder.metrics, step)
    if checkpoint:
        print(f"going on from step {step:,} of an unfinished run")
    return checkpoint


def _difference_name(keys: tuple[str, ...]) -> str:
    """The setting's own name; of the inputs, whose keys are paths, the first word says enough."""
    return keys[1] if keys[0] == "settings" and len(keys) > 1 else keys[0]


def _prepare(
    settings: FinetuneSettings, found: _Inputs, where: Allocation, folder: FinetuneFolder, resume_from: Path | None
) -> tuple[Account, Account | None, Plan]:
    """Tokenizer, chat template, examples and plan, in the unfinished folder. What is wrong with the data ends here."""
    from train.finetune import chat_template, examples, masks

    inputs.copy_tokenizer(found.tokenizer_dir, folder.tokenizer_dir)
    tokenizer = inputs.load_tokenizer(folder.tokenizer_dir)
    added = 0
    if settings.additional_special_tokens:
        added = inputs.add_tokens(folder.tokenizer_dir, settings.additional_special_tokens)
        tokenizer = inputs.load_tokenizer(folder.tokenizer_dir)
    refuse(inputs.fit_problems(found.model_dir, tokenizer, max_seq_length=settings.max_seq_length, added_tokens=added))
    refuse(methods.added_token_problems(settings, found.model_dir, added))
    template, notice = chat_template.choose(
        tokenizer,
        instruction_template=settings.instruction_template,
        response_template=settings.response_template,
        prompt=data_settings.prompt_of(settings),
    )
    tokenizer.chat_template = template
    (folder.tokenizer_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    if notice:
        print(f"note: {notice}")
    account, eval_account = examples.prepare_all(
        tokenizer, found.sources, settings, folder.train_examples, folder.eval_examples
    )
    print(account.summary())
    if account.shown:
        masks.print_examples(tokenizer, account.shown, stream=sys.stdout)
    if found.eval_files:
        eval_account = examples.prepare(tokenizer, found.eval_files, settings, folder.eval_examples)
    if eval_account is not None:
        print(f"held out: {eval_account.summary()}")
    if found.deepspeed is not None:
        shutil.copyfile(found.deepspeed, folder.deepspeed_config)
    plan = Plan(
        finetune=_with_wandb_group(settings),
        model_dir=found.model_dir,
        device=where.device,
        base_name=settings.model_name_or_path if found.base_model_on_hub else str(found.model_dir),
        deepspeed_config=_deepspeed_file(settings, folder),
        zero_stage=settings.zero_stage if found.deepspeed is None else _zero_stage(found.deepspeed),
        resume_from=resume_from,
        added_tokens=added,
    )
    folder.plan.write_text(settings_module.to_yaml(plan), encoding="utf-8")
    folder.recipe.write_text(settings_module.to_yaml(settings), encoding="utf-8")
    return account, eval_account, plan


def _train(plan: Plan, where: Allocation, folder: FinetuneFolder, *, began: float) -> None:
    print(f"where: {where.reason}")
    print(f"batch: {_layout(plan.finetune, where)}", flush=True)
    remove_stale_locks(folder.extensions_dir)
    log = folder.log(socket.gethostname(), time.strftime("%Y.%m.%d_%H.%M.%S"))
    end = launch.run(_launch_plan(plan.finetune, where, folder, plan.model_dir, began=began), log=log)
    outcome.check(folder.outcome, end.exit_status, log=log, cause=end.text)


def _results(
    settings: FinetuneSettings,
    found: _Inputs,
    where: Allocation,
    account: Account,
    eval_account: Account | None,
    checks: Mapping[str, Any],
    folder: FinetuneFolder,
) -> dict[str, Any]:
    """The run in numbers, read from its own metrics."""
    records = list(progress.records(folder.metrics))
    return {
        "method": methods.of(settings),
        "base_model": settings.model_name_or_path,
        "base_model_on_hub": found.base_model_on_hub,
        "examples": account.as_dict(),
        "eval_examples": eval_account.as_dict() if eval_account else None,
        "layout": {
            "world_size": where.world_size,
            "device": where.device,
            "zero_stage": _zero_stage(folder.deepspeed_config),
            "examples_per_step": settings.per_device_train_batch_size
            * settings.gradient_accumulation_steps
            * where.world_size,
        },
        "parameters": checks["weights"]["parameters"],
        "best": checks["best"],
        "steps": json.loads(folder.saved.read_text(encoding="utf-8"))["steps"],  # not each one is among the records
        "tokens": max(record.get("tokens", 0) for record in records),
        **progress.summary(records),
        "first_eval_loss": next((record["eval_loss"] for record in records if "eval_loss" in record), None),
        "lineage": lineage.trace(file for file in found.files() if file.name != manifest.FILE_NAME),
    }


def _zero_stage(config: Path) -> int:
    """The stage that a DeepSpeed configuration states; 0 without one."""
    if not config.is_file():
        return 0
    return int(json.loads(config.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
