"""The one owner of a finetuning run's file names.

While it trains, everything is in `.NAME.unfinished-run` beside the output, where the same command finds it again and
goes on. When all is proven, `whole/` inside it is renamed to the output: that name never shows half a model.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train.checkpoint_folders import GOLDEN_LOGITS
from train.errors import UserError, user_message
from train.finetune.settings import FinetuneSettings
from train.settings import setting

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KEPT_NAMES = (
    "log",
    "profile",
    "tensorboard",
    "wandb",
    "metrics.jsonl",
    "samples.jsonl",
    "recipe.yaml",
    "deepspeed_config.json",
)


@dataclass(frozen=True)
class FinetuneFolder:
    """Names of one run's files.

    Attributes:
        output: the folder that --output_dir names.
    """

    output: Path

    @property
    def root(self) -> Path:
        return self.output.with_name(f".{self.output.name}.unfinished-run")

    @property
    def identity(self) -> Path:
        """Settings and inputs of the unfinished run, to tell whether a call means the same one."""
        return self.root / "identity.json"

    @property
    def plan(self) -> Path:
        """What the ranks read."""
        return self.root / "plan.yaml"

    @property
    def recipe(self) -> Path:
        """The resolved settings: running that file again gives the same run."""
        return self.root / "recipe.yaml"

    @property
    def deepspeed_config(self) -> Path:
        return self.root / "deepspeed_config.json"

    @property
    def profile_dir(self) -> Path:
        """What `train.monitor.step_profile` recorded."""
        return self.root / "profile"

    @property
    def train_examples(self) -> Path:
        return self.root / "train.arrow"

    @property
    def eval_examples(self) -> Path:
        return self.root / "eval.arrow"

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's files as they came, and the chat template."""
        return self.root / "tokenizer"

    @property
    def samples(self) -> Path:
        """What the model answered at its checkpoints (`train.monitor.samples`)."""
        return self.root / "samples.jsonl"

    @property
    def checkpoint_dir(self) -> Path:
        return self.root / "checkpoint"

    @property
    def model_dir(self) -> Path:
        """The trained model, and when it is proven all else that makes the output."""
        return self.root / "model"

    @property
    def golden_logits(self) -> Path:
        return self.root / GOLDEN_LOGITS

    @property
    def saved(self) -> Path:
        """What the first rank says of the weights it saved: compared with the live ones, tensor by tensor."""
        return self.root / "saved.json"

    @property
    def merged_dir(self) -> Path:
        """The model with the adapter in its weights, beside the adapter."""
        return self.model_dir / "merged"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / "tensorboard"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def launch_dir(self) -> Path:
        """What a launch needs while it runs (`train.cluster.launch`)."""
        return self.root / "launch"

    @property
    def extensions_dir(self) -> Path:
        return self.root / "torch_extensions"

    def log(self, host: str, time: str) -> Path:
        return self.root / "log" / f"{host}_{time}.log"

    def is_unfinished(self) -> bool:
        """Whether there is a run to go on with."""
        return self.former_identity() is not None

    def former_identity(self) -> dict[str, Any] | None:
        """The unfinished run's identity; None without one, and for a file that is damaged: nothing can trust it."""
        try:
            former = json.loads(self.identity.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return former if isinstance(former, dict) else None

    def refuse_foreign_output(self) -> None:
        """Refuses to replace a folder that no step made: --overwrite is for outputs, not for somebody's files.

        Stricter than `outputs.refuse_foreign`: a tokenizer_config.json is in every model that was downloaded.

        Raises:
            UserError: the output is there, is not empty, and holds no manifest.
        """
        is_in_use = self.output.is_dir() and any(self.output.iterdir())
        if is_in_use and not (self.output / manifest.FILE_NAME).is_file():
            raise UserError(
                f"--output_dir {self.output} holds no {manifest.FILE_NAME}, so no step made it and --overwrite does "
                "not replace it: choose another output, or empty it."
            )

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint: a run killed while saving leaves one without its mark."""
        if not self.checkpoint_dir.is_dir():
            return None
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.checkpoint_dir.iterdir()]
        steps = [(int(match[1]), path) for match, path in found if match and checkpoint_mark(path).is_file()]
        return max(steps)[1] if steps else None

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Names the output where an error of the user's names no file: a full disk often says no more than that.

        Raises:
            UserError: such an error came up.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            message = user_message(error)
            if message is None or getattr(error, "filename", None):
                raise
            raise UserError(f"{self.output}: {message}") from error

    def remove_half_written(self) -> None:
        """Removes what a run that broke off while saving cannot go on with."""
        shutil.rmtree(self.model_dir, ignore_errors=True)
        checkpoints = self.checkpoint_dir.iterdir() if self.checkpoint_dir.is_dir() else ()
        for path in [path for path in checkpoints if _CHECKPOINT.fullmatch(path.name)]:
            if not checkpoint_mark(path).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def add_records(self) -> None:
        """Copies what tells about the run beside the model. Copies: a killed launch still has its own to go on with."""
        for name in _KEPT_NAMES:
            source = self.root / name
            if source.is_dir():
                shutil.copytree(source, self.model_dir / name, symlinks=True)
            elif source.is_file():
                shutil.copyfile(source, self.model_dir / name)

    def publish(self) -> None:
        """Gives the output its name, replacing what is there, and removes what only training needed."""
        if self.output.exists():
            self.output.rename(self.root / "replaced")
        outputs.share(self.model_dir)
        self.model_dir.rename(self.output)
        shutil.rmtree(self.root)


def checkpoint_mark(checkpoint: Path) -> Path:
    """The file that says a checkpoint is whole, written last."""
    return checkpoint / "whole"


@dataclass(frozen=True)
class Plan:
    """What the launcher has found out, for the ranks."""

    finetune: FinetuneSettings
    model_dir: Path = setting(help="folder of the base model")
    device: str = setting(help="cuda or cpu")
    base_name: str = setting(help="what an adapter calls its base: a name on the Hub, or an absolute folder")
    deepspeed_config: Path | None = setting(help="DeepSpeed JSON; None trains without")
    zero_stage: int = setting(help="the stage that the DeepSpeed JSON states; 0 without")
    resume_from: Path | None = setting(help="checkpoint to go on from; None starts from the base model")
    added_tokens: int = setting(help="tokens added to the tokenizer, for which the embeddings grow")
