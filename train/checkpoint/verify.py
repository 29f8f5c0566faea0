"""Proves a Hugging Face folder by numbers: reads it anew and holds it against what it was made from.

    checks = verify(folder, Source(weights=..., golden_logits=step_dir / "golden_logits.safetensors", ...))
    verification.write(folder, checks)

Step 3 calls it before a converted folder appears, `verify_model.py` calls it on a folder that is there, and any other
step that writes a model may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.safetensors_folder import SafetensorsFolder
from train.checkpoint.streamed_model import compute_logits
from train.errors import UserError, VerificationError, first_line

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_MEASURE = "max |difference| / max |golden logits|, computed in float32 from the folder's weights"
ROUNDING_MEASURE = "twice what the folder's own logits change by when they are computed in that type"
# Correct exports in float32 stay below 1e-6, and on a small model the wrong form of GELU costs as little as 1e-4: 1e-5.
# The others are four times the spacing of numbers near 1 in that type: rounding at each of some tens of layers adds up
# like a random walk and stays below, a wrong layer is off by a tenth and more.
LOGITS_TOLERANCE = {"float32": 1e-5, "float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7}
# Large, sharp weights make more of rounding than that. How much, the folder itself tells when it computes in the type
# of the golden logits: two computations that round differently are not further apart than twice that. Beyond this bound
# the proof would be none.
_LARGEST_ROUNDING = 0.25
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Source:
    """What a model folder is held against; what is None is not compared, and the record says so.

    Attributes:
        weights: gives (name, tensor) as the source has them, the vocabulary already cut.
        weights_name: what the weights were read from, for the record.
        golden_logits: safetensors with `input_ids` int64 [1, n] and `logits` float32 [1, n, vocabulary]; its metadata
            may name the `dtype` they were computed in.
        tokenizer_model: the SentencePiece model.
        parity_texts: texts that both tokenizers must read alike.
        parity_source: where the texts are from, for the record.
    """

    weights: Callable[[], Iterator[tuple[str, Tensor]] | None] | None = None
    weights_name: str = "none: no source was given"
    golden_logits: Path | None = None
    tokenizer_model: Path | None = None
    parity_texts: Sequence[str] = ()
    parity_source: str = "none"


def verify(folder: Path, source: Source) -> dict[str, Any]:
    """Checks weights, logits, tokenizer and configuration of `folder` as transformers sees them.

    One module's weights are in memory at a time, so that models larger than the memory can be proven.

    Returns:
        `weights`, `logits`, `tokenizer` and `config`: what was compared with what, and the numbers.

    Raises:
        VerificationError: something differs; all differences at once.
        UserError: the folder cannot be loaded at all.
    """
    model, tokenizer = load(folder, without_weights=True)
    stored = SafetensorsFolder(folder)
    problems: list[str] = []
    checks = {
        "weights": _check_weights(model, stored, source, problems),
        "logits": _check_logits(model, stored, source, problems),
        "tokenizer": _check_tokenizer(folder, tokenizer, source, problems),
        "config": _check_config(model, tokenizer, source, problems),
    }
    if problems:
        raise VerificationError(problems)
    return checks


def load(folder: Path, *, without_weights: bool = False) -> tuple[Any, Any]:
    """The folder's model, in the type it is stored in and ready to compute, and its tokenizer.

    Args:
        folder: a model folder.
        without_weights: check that the weights fit the configuration, and leave them on the disk.

    Raises:
        UserError: transformers cannot load them.
        VerificationError: weights are missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters below is raised
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            output_loading_info=True,
            local_files_only=True,
            **({"device_map": {"": "meta"}} if without_weights else {}),
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from None
    wrong = [f"{folder}: {count} weights are {what}" for what, count in _loading_problems(info)]
    if wrong:
        raise VerificationError(wrong)
    return model.eval(), tokenizer


def _loading_problems(info: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            yield f"{key.removesuffix('_keys')}, first {sorted(map(str, info[key]))[0]}", len(info[key])


def _check_weights(model: Any, stored: SafetensorsFolder, source: Source, problems: list[str]) -> dict[str, Any]:
    """What the folder holds against what the source holds: each tensor, to the last bit of its type."""
    for name in stored.names:
        if not _is_finite(stored.read(name)):
            problems.append(f"{name} holds NaN or infinity: the checkpoint is broken; convert an earlier one.")
    record: dict[str, Any] = {
        "compared_with": source.weights_name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    originals = source.weights() if source.weights is not None else None
    if originals is None:
        return record
    largest, seen, differing = 0.0, set(), []
    for name, original in originals:
        seen.add(name)
        if name not in stored.names:
            problems.append(f"{name} is in the source and not in the loaded model.")
            continue
        written = stored.read(name)
        if (written.shape, written.dtype) != (original.shape, original.dtype):
            problems.append(f"{name} is {_described(written)}, the source has {_described(original)}.")
        elif not written.equal(original):
            difference = float((written.double() - original.double()).abs().max())
            largest = max(largest, difference)
            differing.append(f"{name} by {difference:.3g}")
    if differing:
        problems.append(
            f"{len(differing)} tensors differ from the source, which they must equal: {differing[0]} at most."
        )
    for name in sorted(set(stored.names) - seen):
        problems.append(f"{name} is in the loaded model and not in the source.")
    return record | {"tensors": len(seen), "max_abs_difference": largest}


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; without a second tensor of that size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _check_logits(model: Any, stored: SafetensorsFolder, source: Source, problems: list[str]) -> dict[str, Any]:
    import torch

    def logits_in(dtype: str) -> Tensor:
        return compute_logits(model.config, input_ids, stored.names, stored.read, dtype=dtype)

    vocab_size = model.config.vocab_size
    if source.golden_logits is None:
        input_ids = torch.arange(min(_PROBE_TOKENS, vocab_size)).unsqueeze(0)
        finite = bool(logits_in("float32").isfinite().all())
        if not finite:
            problems.append("the model's logits hold NaN or infinity: convert an earlier checkpoint.")
        return {"compared_with": "none: the source has no golden logits", "finite": finite}

    input_ids, golden, computed_in = read_golden_logits(source.golden_logits)
    dtype = computed_in or str(model.dtype).removeprefix("torch.")
    tolerance = LOGITS_TOLERANCE.get(dtype, LOGITS_TOLERANCE["float32"])
    record: dict[str, Any] = {
        "compared_with": f"{source.golden_logits.name} of the training process",
        "measure": LOGITS_MEASURE,
        "tokens": input_ids.numel(),
        "golden_dtype": dtype,
        "tolerance": tolerance,
    }
    if int(input_ids.max()) >= vocab_size or golden.shape[-1] < vocab_size:
        problems.append(
            f"the golden logits are of {golden.shape[-1]} pieces, the model of {vocab_size}: wrong tokenizer?"
        )
        return record
    record |= compare_logits(golden[..., :vocab_size], dtype, logits_in)
    problems.extend(logits_problems(record, "the logits"))
    return record


def compare_logits(
    golden: Tensor, dtype: str, logits_in: Callable[[str], Tensor], *, at_least: float | None = None
) -> dict[str, Any]:
    """Holds a folder's logits against those of the training process.

    Args:
        golden: float32 [1, n, vocabulary].
        dtype: the type that they were computed in.
        logits_in: computes the folder's, float32 of the same shape, in a type.
        at_least: what is allowed in any case, instead of what goes by the type.

    Returns:
        `tolerance`, `relative_difference` and `finite`; where rounding explains more, `tolerance_is` and `rounding`.
    """
    tolerance = at_least or LOGITS_TOLERANCE.get(dtype, LOGITS_TOLERANCE["float32"])
    logits = logits_in("float32")
    difference = _relative_difference(logits, golden)
    record: dict[str, Any] = {}
    if not difference <= tolerance and dtype in ("bfloat16", "float16"):
        rounding = _relative_difference(logits_in(dtype), logits)
        tolerance = max(tolerance, min(2 * rounding, _LARGEST_ROUNDING))
        record = {"tolerance_is": ROUNDING_MEASURE, "rounding": rounding}
    found = {"tolerance": tolerance, "relative_difference": difference, "finite": bool(logits.isfinite().all())}
    return record | found


def logits_problems(record: Mapping[str, Any], whose: str) -> Iterator[str]:
    """What is wrong by the record of `compare_logits`."""
    difference, tolerance = record["relative_difference"], record["tolerance"]
    if not difference <= tolerance:  # NaN is no pass
        yield (
            f"{whose} differ from the training process's own by {difference:.3g}, "
            f"{tolerance:.3g} is allowed ({LOGITS_MEASURE})."
        )


def _relative_difference(logits: Tensor, golden: Tensor) -> float:
    return float((logits.double() - golden.double()).abs().max() / golden.double().abs().max())


def read_golden_logits(file: Path) -> tuple[Tensor, Tensor, str | None]:
    """`input_ids` [1, n], `logits` [1, n, vocabulary], and the type they were computed in when the file says so.

    Raises:
        UserError: the file is damaged or lacks one of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            input_ids, logits = stored.get_tensor("input_ids"), stored.get_tensor("logits")
            dtype = (stored.metadata() or {}).get("dtype")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): choose another checkpoint.") from None
    if input_ids.ndim != 2 or logits.shape[:2] != input_ids.shape or input_ids.numel() == 0:
        shapes = f"input_ids {list(input_ids.shape)} and logits {list(logits.shape)}"
        raise UserError(
            f"{file} holds {shapes}, [1, n] and [1, n, vocabulary] were expected: choose another checkpoint."
        )
    return input_ids, logits, dtype.removeprefix("torch.") if dtype else None


def _check_tokenizer(folder: Path, tokenizer: Any, source: Source, problems: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"vocab_size": len(tokenizer), "compared_with": "none: no SentencePiece model was given"}
    if source.tokenizer_model is None:
        return record
    from train.tokenizer.parity import compare

    report = compare(source.tokenizer_model, folder, source.parity_texts)
    if not report.passed:
        problems.append(
            f"the converted tokenizer differs from {source.tokenizer_model.name} in {report.mismatched_ids} ids and "
            f"{report.mismatched_decodes} decodes of {report.texts} texts; first: {report.first_difference}."
        )
    counts = {name: value for name, value in report.as_dict().items() if name not in ("passed", "first_difference")}
    return record | {
        "compared_with": source.tokenizer_model.name,
        "texts_from": source.parity_source,
        "mismatches": report.mismatched_ids + report.mismatched_decodes,
        **counts,
    }


def _check_config(model: Any, tokenizer: Any, source: Source, problems: list[str]) -> dict[str, Any]:
    """Special tokens and sizes: configuration, generation configuration and tokenizer must say the same."""
    config, generation = model.config, model.generation_config
    record: dict[str, Any] = {"vocab_size": config.vocab_size}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        in_tokenizer, in_config, in_generation = (
            getattr(tokenizer, name),
            getattr(config, name),
            getattr(generation, name),
        )
        stops = in_generation if isinstance(in_generation, list) else [in_generation]
        record[name] = in_tokenizer
        if in_tokenizer != in_config or in_tokenizer not in stops:
            problems.append(
                f"{name} is {in_tokenizer} in the tokenizer, {in_config} in config.json and {in_generation} in "
                "generation_config.json: they must agree."
            )
    record["generation_eos_token_id"] = generation.eos_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    is_exact = source.tokenizer_model is not None  # padded embeddings are usual elsewhere; ours are cut
    if rows != config.vocab_size or len(tokenizer) > rows or (is_exact and len(tokenizer) != rows):
        problems.append(
            f"the tokenizer has {len(tokenizer)} pieces, the embedding {rows} rows, config.json says "
            f"{config.vocab_size}: they must agree."
        )
    positions = getattr(config, "max_position_embeddings", None)
    record |= {"model_max_length": tokenizer.model_max_length, "max_position_embeddings": positions}
    if positions is not None and is_exact and tokenizer.model_max_length > positions:
        problems.append(f"the tokenizer allows {tokenizer.model_max_length} tokens, the model {positions} positions.")
    return record


def summary(checks: dict[str, Any]) -> str:
    """The checks as a few lines for the terminal."""
    weights, logits, tokenizer = checks["weights"], checks["logits"], checks["tokenizer"]
    lines = [f"weights    compared with {weights['compared_with']}"]
    if "max_abs_difference" in weights:
        lines[0] += f": largest difference {weights['max_abs_difference']:.3g} in {weights['tensors']} tensors"
    lines.append(f"logits     compared with {logits['compared_with']}")
    if "relative_difference" in logits:
        lines[1] += f": {logits['relative_difference']:.3g}, allowed {logits['tolerance']:.3g}"
    lines.append(f"tokenizer  compared with {tokenizer['compared_with']}")
    if "mismatches" in tokenizer:
        lines[2] += f": {tokenizer['mismatches']} mismatches in {tokenizer['texts']} texts ({tokenizer['texts_from']})"
    return "\n".join(lines)
