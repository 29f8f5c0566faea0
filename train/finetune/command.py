"""What a finetuning runs on its nodes: the ranks' command, their DeepSpeed configuration, the launch, in words too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from train.cluster import launch
from train.cluster.allocation import Allocation
from train.cluster.ranks import rank_argv, rank_environment
from train.finetune import batch, deepspeed_config
from train.finetune.folder import FinetuneFolder
from train.finetune.settings import FinetuneSettings
from train.process import Command


def processes(settings: FinetuneSettings) -> int:
    """Processes on each node; a model that is spread over the GPUs has one."""
    return 1 if settings.device_map is not None else settings.num_processes


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


def launch_plan(
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
        is_distributed=where.world_size > 1 or deepspeed_file(settings, folder) is not None,
        began=began,
    )


def show(settings: FinetuneSettings, where: Allocation, folder: FinetuneFolder) -> int:
    """Prints what --dry_run asks for."""
    command = build_command(settings, where, folder)
    print(f"where: {where.reason}")
    print(f"batch: {batch.layout(settings, where.world_size)}")
    print(f"output: {folder.output}")
    for file, text in command.files.items():
        print(f"\n# {file}\n{text.rstrip()}")
    print(f"\n{launch_plan(settings, where, folder).text()}")
    return 0


def deepspeed_file(settings: FinetuneSettings, folder: FinetuneFolder) -> Path | None:
    """What the ranks read: made for --zero_stage, or a copy of --deepspeed, which may be edited in the meantime."""
    return folder.deepspeed_config if settings.deepspeed is not None or settings.zero_stage else None


def zero_stage(config: Path) -> int:
    """The stage that a DeepSpeed configuration states; 0 without one."""
    if not config.is_file():
        return 0
    return int(json.loads(config.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
