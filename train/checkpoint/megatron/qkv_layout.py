"""Which row order the fused query-key-value projection of a checkpoint has: known from the commit, or proven.

Nothing in the weights says it (see merge.py). The commit of the engine does, when golden logits or the run's manifest
name it; otherwise both orders are tried against the golden logits; without those, the order of the pinned commit and
of the forks before it is taken, and the result says that nothing proved it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.checkpoint.megatron import configuration
from train.checkpoint.megatron.huggingface_view import open_view
from train.checkpoint.megatron.layout import MegatronCheckpoint
from train.checkpoint.megatron.merge import PER_HEAD, PER_RANK
from train.checkpoint_folders import GOLDEN_LOGITS
from train.errors import VerificationError
from train.run_folder import of_checkpoint

_BY_COMMIT = {
    "6acc370a41440098031227e881bd9f1f23aa369e": PER_HEAD,
    "1c68b0e71237e6d9734881ed6b99beae66d048cf": PER_HEAD,  # the seeds' fork, ucllm_nedo_v20240415.1.0
    "4efb479d5317ce9b86096b9d8e3e8030b0b5263b": PER_RANK,
}
ORDER = "query_key_value_order"  # our own argument, in an imported checkpoint
_FAR = 0.05  # relative; a wrong order of trained weights is off by far more, rounding to bf16 by far less


def find(checkpoint: MegatronCheckpoint, *, vocab_size: int) -> tuple[str, str]:
    """The row order, and how it is known.

    Raises:
        VerificationError: neither order gives the engine's own logits.
    """
    imported = getattr(checkpoint.arguments, ORDER, None)
    if imported is not None:
        return str(imported), "as the import wrote it"
    commit = recorded_commit(checkpoint.folder)
    if commit in _BY_COMMIT:
        return _BY_COMMIT[commit], f"of engine commit {commit[:8]}"
    golden = checkpoint.folder / GOLDEN_LOGITS
    if not golden.is_file():
        return PER_HEAD, "assumed: neither commit nor golden logits are recorded"
    distances = {order: _distance(checkpoint, order, golden, vocab_size) for order in (PER_HEAD, PER_RANK)}
    best = min(distances, key=lambda order: distances[order])
    if not distances[best] < _FAR:
        raise VerificationError(
            f"neither order of query, key and value gives the logits in {golden}"
            f" (relative differences {', '.join(f'{order}: {value:.3g}' for order, value in distances.items())}):"
            " the weights or the logits are not what they claim to be."
        )
    return best, f"proven by golden logits ({distances[best]:.1g} against {max(distances.values()):.1g})"


def order_of(commit: str | None) -> str | None:
    """The row order of an engine's commit; None when it is not known."""
    return _BY_COMMIT.get(commit or "")


def recorded_commit(folder: Path) -> str | None:
    """The engine's commit, from beside the golden logits or from the run's manifest; None when neither names it."""
    golden = folder / GOLDEN_LOGITS
    if golden.is_file():
        commit = _golden_metadata(golden).get("engine_commit")
        if commit not in (None, "unknown"):
            return commit
    run_folder = of_checkpoint(folder)
    if run_folder is None or not run_folder.manifest.is_file():
        return None
    record: Any = json.loads(run_folder.manifest.read_text(encoding="utf-8"))
    commit = record.get("results", {}).get("engine_commit") if isinstance(record, dict) else None
    return commit if isinstance(commit, str) else None


def _golden_metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            return dict(stored.metadata() or {})
    except SafetensorError:
        return {}  # verification reads it again, and says what is wrong


def _distance(checkpoint: MegatronCheckpoint, order: str, golden_file: Path, vocab_size: int) -> float:
    """Largest difference to the golden logits, relative to the largest of them, in float32."""
    from train.checkpoint.streamed_model import compute_logits
    from train.checkpoint.verify import read_golden_logits

    input_ids, golden, _ = read_golden_logits(golden_file)
    config = configuration.to_huggingface(checkpoint.arguments, vocab_size=vocab_size, dtype="float32")
    view = open_view(checkpoint, vocab_size=vocab_size, order=order)
    logits = compute_logits(config, input_ids, view.names, view.read)
    golden = golden[..., :vocab_size]
    return float((logits - golden).abs().max() / golden.abs().max())
