"""transformers' Trainer for pretraining on fixed-length token sequences.

What differs from the stock Trainer, and why:
- batches come in the dataset's own order: the dataset is shuffled by seed once, so that a resumed run and a run on
  another number of ranks see the same global batches;
- the learning rate follows tokens (schedule.py);
- labels are the inputs moved by one, cut from sequences of `sequence_length + 1` tokens, so that every position of the
  model is trained;
- a checkpoint is written under the Trainer's name and renamed `global_stepN` when all of it is there, with the logits
  of a fixed batch, by which a conversion is proven later; one with NaN in it is never written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback

from train.checkpoint_files import without_inner_checksums
from train.checkpoint_folders import GOLDEN_LOGITS, prune, publish
from train.data.gpt_dataset import GPTDataset
from train.engine.non_finite import non_finite
from train.engine.transformers.schedule import learning_rate
from train.monitor.progress import Progress
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

_GOLDEN_TOKENS = 64
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class TokenSequences(Dataset[dict[str, torch.Tensor]]):
    """A `GPTDataset` as torch has it: `input_ids` and `labels`, int64, each of length sequence_length."""

    def __init__(self, sequences: GPTDataset) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self._sequences[index])
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class PretrainTrainer(Trainer):
    """See the module. `golden_input_ids`: int64 [1, n], the fixed batch whose logits go into every checkpoint."""

    def __init__(self, *, recipe: PretrainRecipe, run_folder: RunFolder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already: divide by the accumulation steps
        self._recipe = recipe
        self._run_folder = run_folder
        self._sequences: TokenSequences = arguments["train_dataset"]
        self._golden_input_ids = self._sequences[0]["input_ids"][:_GOLDEN_TOKENS].unsqueeze(0)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self._sequences if train_dataset is None else train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            training, tokens_per_step = self._recipe.training, self._recipe.tokens_per_step
            peak, scheduled = training.lr, self.optimizer if optimizer is None else optimizer
            assert peak is not None and scheduled is not None

            def factor(step: int) -> float:
                return learning_rate(training, step * tokens_per_step) / peak

            self.lr_scheduler = LambdaLR(scheduled, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits = outputs.logits.float()
        loss = cross_entropy(logits.view(-1, logits.size(-1)), inputs["labels"].reshape(-1))
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        logits = self._golden_logits()
        if not bool(torch.isfinite(logits).all()):
            raise non_finite(self._run_folder.checkpoint_dir, self.state.global_step, "the weights")
        with without_inner_checksums():
            super()._save_checkpoint(model, trial)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank's part is on disk
        if self.is_world_process_zero():
            self._finish_checkpoint(logits)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody looks for it before it has its name

    def _golden_logits(self) -> torch.Tensor:
        """Logits of the fixed batch from the live weights, float32 [1, n, vocabulary]. All ranks take part (ZeRO-3)."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=self._golden_input_ids.to(self.args.device), use_cache=False).logits
        model.train(was_training)
        return logits.float().cpu().contiguous()

    def _finish_checkpoint(self, logits: torch.Tensor) -> None:
        step = self.state.global_step
        unfinished = self._run_folder.checkpoint_dir / f"checkpoint-{step}"
        tensors = {"input_ids": self._golden_input_ids.contiguous(), "logits": logits}
        computed_in = {"dtype": _DTYPES[self._recipe.training.precision]}  # how near an export can come to them
        save_file(tensors, unfinished / GOLDEN_LOGITS, metadata=computed_in)
        publish(unfinished, self._run_folder.step_dir(step))
        prune(self._run_folder.checkpoint_dir, self._recipe.checkpoint.keep_last)


class ProgressCallback(TrainerCallback):
    """Hands what the Trainer logs to `Progress` (first rank) and to W&B (first rank of each node)."""

    def __init__(self, run_folder: RunFolder, progress: Progress | None, wandb_run: Any) -> None:
        self._run_folder = run_folder
        self._progress = progress
        self._wandb_run = wandb_run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a resumed Trainer would keep the checkpoint's intervals and ignore the ones asked for now
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        state.eval_steps = args.eval_steps or state.eval_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the last step's loss is part of the record, whatever the interval

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if self._wandb_run is not None and loss is not None:
            self._wandb_run.log(logs, step=state.global_step)
        if loss is not None and not torch.isfinite(torch.tensor(loss)):
            raise non_finite(self._run_folder.checkpoint_dir, state.global_step, "the loss")
        if self._progress is None:
            return
        if "loss" in logs:
            self._progress.train(
                state.global_step, loss=logs["loss"], lr=logs["learning_rate"], grad_norm=logs.get("grad_norm")
            )
        elif "eval_loss" in logs:
            self._progress.evaluation(state.global_step, loss=logs["eval_loss"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            print(f"step {state.global_step:,}: saved {self._run_folder.step_dir(state.global_step)}", flush=True)
            self._progress.pause(state.global_step)
