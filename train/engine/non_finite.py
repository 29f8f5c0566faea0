"""What both engines say when training met NaN or infinity, in the loss or in the weights.

raise non_finite(checkpoint_dir, step, "the weights")
"""

from __future__ import annotations

from pathlib import Path

from train.checkpoint_folders import whole_checkpoints
from train.errors import NonFiniteLossError


def non_finite(checkpoint_dir: Path, step: int, what: str) -> NonFiniteLossError:
    """The error for NaN or infinity at `step`, naming the newest whole checkpoint as the one to go back to."""
    whole = [folder for _, folder in whole_checkpoints(checkpoint_dir)]
    last = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
    return NonFiniteLossError(
        f"{what} became NaN or infinite at or before step {step:,}; {last}. The same command would meet it again: start"
        " another --job_name with a lower --lr, a longer --lr_warmup_tokens, or --precision bf16."
    )
