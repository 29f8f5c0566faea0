"""The held-out loss: the mean over all trained tokens of the held-out data, in nats.

TRL's trainer takes the mean of the batches' means instead. There an answer of three tokens weighs as much as one of
300, and another batch size or number of processes gives another loss for the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl import SFTTrainer


class HeldOutTrainer(SFTTrainer):
    """TRL's trainer, with `eval_loss` and `eval_mean_token_accuracy` summed over all tokens of all ranks."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All of the held-out data, also when a last incomplete batch is dropped in training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's own loop, its loss replaced."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        nats, tokens, right = self._sums.tolist()
        found = {"loss": nats / tokens, "mean_token_accuracy": right / tokens}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, None, None]:
        """Adds up one batch of all ranks; examples that only fill up the last batch do not count."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = model(**inputs, use_cache=False, fused_lm_head=True)
        columns = [column.double() for column in (-found.log_probs, found.label_mask, found.is_top1)]
        sums = _sums_of_examples(torch.stack(columns, dim=-1), inputs)  # they are zero where nothing is trained
        self._sums += self.accelerator.gather_for_metrics(sums.to(self._sums.device)).sum(dim=0)
        nats, tokens, _ = sums.sum(dim=0)
        return nats / tokens.clamp(min=1), None, None


def _sums_of_examples(columns: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Sums [examples, n] of columns [batch, length - 1, n], also where packing has put a batch in one row."""
    if "attention_mask" in inputs:
        return columns.sum(dim=1)
    example = (inputs["position_ids"][0] == 0).cumsum(0)[1:].to(columns.device) - 1  # each begins at position 0
    sums = columns.new_zeros(int(example[-1]) + 1, columns.shape[-1])
    return sums.index_add_(0, example, columns[0])
