"""The one owner of a pretraining run's file names. Watching, resuming and converting need nothing but these.

output_model_dir/
    checkpoint/JOB/global_stepN/     whole checkpoints; `latest` names the newest
    manifest/JOB.json                what ran, and what came out
    recipe/JOB.identity.json         what a call must agree with to go on from the checkpoints
    recipe/JOB.yaml                  the resolved recipe: running that file again gives the same run
    metrics/JOB.jsonl                one JSON object per progress line
    deepspeed_config/JOB.json        rendered from the recipe
    log/JOB_HOST_TIME.log            everything the ranks printed
    launch/JOB/                      the environment script by which every node starts, and the ssh configuration
    profile/JOB/                     where the time of one step went, on every rank (--profile_step)
    tensorboard/JOB/
    wandb/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint_folders import whole_checkpoints
from train.monitor import progress

if TYPE_CHECKING:
    from train.recipe import PretrainRecipe


@dataclass(frozen=True)
class Load:
    """What Megatron-DeepSpeed loads when a run goes on, or begins with weights that are there.

    Attributes:
        tag: the checkpoint's folder, inside the job's.
        is_universal: whether it is in DeepSpeed's form for other layouts.
        vocabulary_divisor: upstream's --make-vocab-size-divisible-by, where its default would change the embedding.
        initial_from: the folder with the tag when the run begins, from the weights alone; None when it goes on.
        layers_per_stage: the pipeline stages that its files are of, to which the run keeps; empty leaves them open.
    """

    tag: str
    is_universal: bool = False
    vocabulary_divisor: int | None = None
    initial_from: Path | None = None
    layers_per_stage: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """Names of one run's files.

    Attributes:
        root: the folder that --output_model_dir names.
        job_name: the run's name inside it.
        load: what the run goes on from; None is the newest checkpoint, if there is one.
    """

    root: Path
    job_name: str
    load: Load | None = None

    @classmethod
    def of(cls, recipe: PretrainRecipe) -> RunFolder:
        """The folder of a resolved recipe's run."""
        assert recipe.checkpoint.job_name is not None, "resolved() comes first"
        return cls(recipe.checkpoint.output_model_dir, recipe.checkpoint.job_name)

    @property
    def checkpoint_dir(self) -> Path:
        return self.root / "checkpoint" / self.job_name

    @property
    def manifest(self) -> Path:
        return self.root / "manifest" / f"{self.job_name}.json"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe" / f"{self.job_name}.yaml"

    @property
    def identity(self) -> Path:
        """What makes this run this run: another one does not go on from its checkpoints (`train.same_run`)."""
        return self.root / "recipe" / f"{self.job_name}.identity.json"

    @property
    def lock(self) -> Path:
        return self.root / "recipe" / f".{self.job_name}.lock"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics" / f"{self.job_name}.jsonl"

    @property
    def deepspeed_config(self) -> Path:
        return self.root / "deepspeed_config" / f"{self.job_name}.json"

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / "tensorboard" / self.job_name

    @property
    def profile_dir(self) -> Path:
        return self.root / "profile" / self.job_name

    @property
    def outcome(self) -> Path:
        """Where the ranks say how the run ended, for the launcher to read (`train.outcome`)."""
        return self.root / "log" / f"{self.job_name}.outcome.json"

    @property
    def extensions_dir(self) -> Path:
        """Where DeepSpeed compiles its ops: the run's own, so that a killed build cannot hang another run."""
        return self.root / "torch_extensions"

    @property
    def launch_dir(self) -> Path:
        """What a launch needs while it runs: environment script, ssh configuration (`train.cluster.launch`)."""
        return self.root / "launch" / self.job_name

    @property
    def data_cache_dir(self) -> Path:
        """Where Megatron keeps the sample order it computed, instead of beside the user's data."""
        return self.root / "data_cache"

    def log(self, host: str, time: str) -> Path:
        return self.root / "log" / f"{self.job_name}_{host}_{time}.log"

    def step_dir(self, step: int) -> Path:
        return self.checkpoint_dir / f"global_step{step}"

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, from the folders themselves: a `latest` file may be behind."""
        steps = [step for step, _ in whole_checkpoints(self.checkpoint_dir)]
        return max(steps, default=None)

    def what_to_load(self) -> Load | None:
        """What the run goes on from: by name, as the `latest` file may be behind the folders."""
        step = self.latest_step()
        return self.load or (None if step is None else Load(self.step_dir(step).name))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All progress lines so far; a last line that is still being written is left out."""
        return list(progress.records(self.metrics))


def of_checkpoint(step_dir: Path) -> RunFolder | None:
    """The run that a `global_stepN` folder belongs to, or None when it stands alone."""
    job_dir = step_dir.absolute().parent
    return RunFolder(job_dir.parent.parent, job_dir.name) if job_dir.parent.name == "checkpoint" else None
