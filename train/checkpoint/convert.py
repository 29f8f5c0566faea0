"""Step 3: a tokenizer and a checkpoint become a Hugging Face folder, and are proven equal to what they were made from.

Called by scripts/step3_upload_pretrained_model/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.py.
The folder appears whole and verified, or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train import settings as settings_module
from train.checkpoint import kind, lineage, parity_texts, verification
from train.checkpoint_folders import GOLDEN_LOGITS
from train.errors import UserError
from train.settings import setting
from train.tokenizer.convert import convert_tokenizer, read_model
from train.tokenizer.special_tokens import EOD_TOKEN

STEP = "convert_to_huggingface"


@dataclass(frozen=True)
class ConvertSettings:
    """The settings of step 3's conversion."""

    input_tokenizer_file: Path = setting(help="the SentencePiece model (.model) that the training data was made with")
    input_model_max_length: int = setting(help="longest sequence in tokens: the pretraining's sequence length")
    input_model_dir: Path = setting(help="checkpoint (.../global_stepN), or a job folder: its latest checkpoint")
    output_tokenizer_and_model_dir: Path = setting(help="Hugging Face folder to write")
    parity_text_files: tuple[str, ...] = setting(
        (),
        help="own texts on which both tokenizers must agree, files or globs; by default the run's training data",
        separator=",",
    )
    parity_documents: int = setting(5000, help="largest number of documents to compare the tokenizers on")
    overwrite: bool = setting(False, help="replace an existing output", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done and exit", flag_only=True)

    def problems(self) -> Iterator[str]:
        if self.input_model_max_length < 1:
            yield f"--input_model_max_length {self.input_model_max_length}: a sequence has at least one token."
        if self.parity_documents < 1:
            yield f"--parity_documents {self.parity_documents}: compare on at least one document."


def convert(settings: ConvertSettings) -> int:
    """Converts, verifies, and only then lets the folder appear.

    Raises:
        UserError: an input is missing, damaged or does not fit the others, or the output exists.
        VerificationError: the result differs from its source; no folder is left.
    """
    output_dir = settings.output_tokenizer_and_model_dir
    if settings.dry_run:
        print(_plan(settings))
        return 0
    started = time.time()
    tokenizer_file = settings.input_tokenizer_file
    vocab_size = len(read_model(tokenizer_file).pieces)
    checkpoint_dir, chosen = kind.resolve(settings.input_model_dir)
    found = kind.detect(checkpoint_dir)
    inputs = (tokenizer_file, *found.files)
    plain = settings_module.to_plain(settings)
    if manifest.is_done(output_dir, step=STEP, settings=plain, inputs=inputs):
        verification.require(output_dir)
        print(f"{output_dir} is there already, from the same settings and inputs: nothing to do.")
        return 0
    outputs.refuse_inputs(output_dir, inputs)
    print(f"{chosen}, of the {found.kind} engine ({found.reason})")
    records = lineage.trace(inputs)
    _refuse_other_tokenizer(tokenizer_file, records)
    texts, texts_from = parity_texts.collect(settings.parity_text_files, records, limit=settings.parity_documents)

    with outputs.new_folder(output_dir, overwrite=settings.overwrite) as folder:
        from train.checkpoint import export, verify

        convert_tokenizer(tokenizer_file, folder, model_max_length=settings.input_model_max_length)
        result = export.export(
            checkpoint_dir, folder, vocab_size=vocab_size, model_max_length=settings.input_model_max_length
        )
        _write_special_tokens(folder)
        golden_logits = checkpoint_dir / GOLDEN_LOGITS
        source = verify.Source(
            weights=lambda: export.weights(checkpoint_dir, vocab_size=vocab_size),
            weights_name=result.source,
            golden_logits=golden_logits if golden_logits.is_file() else None,
            tokenizer_model=tokenizer_file,
            parity_texts=texts,
            parity_source=texts_from,
        )
        checks = verify.verify(folder, source)
        verification.write(folder, checks)
        results = {
            "parameters": result.parameters,
            "tensors": result.tensors,
            "dtype": result.dtype,
            "vocab_size": vocab_size,
            "checkpoint": checkpoint_dir.name,
            "engine": found.kind,
            "lineage": records,
        }
        manifest.write(
            folder / manifest.FILE_NAME, step=STEP, settings=plain, inputs=inputs, results=results, started=started
        )
    print(verify.summary(checks))
    print(f"wrote {output_dir}: {result.parameters:,} parameters in {result.dtype}, {vocab_size:,} pieces")
    return 0


def _plan(settings: ConvertSettings) -> str:
    texts = ", ".join(settings.parity_text_files) or "the run's training data when it is readable, and the hard cases"
    return "\n".join(
        (
            f"would convert tokenizer   {settings.input_tokenizer_file}",
            f"          and checkpoint  {settings.input_model_dir}",
            f"          into            {settings.output_tokenizer_and_model_dir}",
            f"longest sequence          {settings.input_model_max_length} tokens",
            f"tokenizers compared on    {texts}",
            "then verify weights, logits, tokenizer and configuration from the written files",
        )
    )


def _refuse_other_tokenizer(tokenizer_file: Path, records: list[dict[str, Any]]) -> None:
    """Refuses a tokenizer other than the one the run's data was made with, when a manifest names that one."""
    ours = manifest.sha256(tokenizer_file)
    for record in records:
        results = record["results"] if isinstance(record["results"], dict) else {}
        theirs = results.get("tokenizer_sha256")
        if theirs not in (None, ours):
            raise UserError(
                f"--input_tokenizer_file {tokenizer_file} is not the tokenizer that the training data was made with "
                f"(SHA-256 {ours[:12]}... here, {theirs[:12]}... in the manifest of {record['step']}): pass that one."
            )


def _write_special_tokens(folder: Path) -> None:
    """Gives config.json and generation_config.json the tokenizer's own special tokens.

    In the training data a document ends with <EOD>, so that a base model stops there: generation ends at either.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    absent = [name for name, value in ids.items() if value is None]
    if absent:
        raise UserError(f"the tokenizer has no {', '.join(absent)}: train it with <s>, </s> and <pad> (step 1 does).")
    end_of_document = tokenizer.get_vocab().get(EOD_TOKEN)
    config = AutoConfig.from_pretrained(folder)
    for name, value in ids.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    stops = [ids["eos_token_id"]] + ([end_of_document] if end_of_document is not None else [])
    GenerationConfig(**{**ids, "eos_token_id": stops}).save_pretrained(folder)
