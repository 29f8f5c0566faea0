"""Verifies a model folder that is there already, against its source as far as that can still be found.

Called by scripts/step3_upload_pretrained_model/verify_model.py. Writes verification.json into the folder, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest
from train.checkpoint import convert, export, kind, lineage, parity_texts, verification
from train.errors import UserError, VerificationError
from train.settings import setting
from train.tokenizer.convert import read_model


@dataclass(frozen=True)
class VerifySettings:
    """The settings of `verify_model.py`."""

    input_tokenizer_and_model_dir: Path = setting(help="Hugging Face folder to verify")
    input_tokenizer_file: Path | None = setting(
        None, help="SentencePiece model to compare with; by default the one that the folder's manifest names"
    )
    input_model_dir: Path | None = setting(
        None, help="checkpoint to compare with; by default the one that the folder's manifest names"
    )
    parity_text_files: tuple[str, ...] = setting(
        (),
        help="own texts on which both tokenizers must agree, files or globs; by default the run's training data",
        separator=",",
    )
    parity_documents: int = setting(5000, help="largest number of documents to compare the tokenizers on")
    dry_run: bool = setting(False, help="print what would be done and exit", flag_only=True)

    def problems(self) -> Iterator[str]:
        if self.parity_documents < 1:
            yield f"--parity_documents {self.parity_documents}: compare on at least one document."


def verify_folder(settings: VerifySettings) -> int:
    """Verifies the folder and records it.

    With no source to be found, a folder that never was verified is loaded, computed with and checked in itself, and
    the record says that nothing was compared; one whose weights changed since their verification is refused.

    Raises:
        UserError: the folder or a named source is missing or cannot be read.
        VerificationError: the folder differs from its source, or is broken.
    """
    folder = settings.input_tokenizer_and_model_dir
    if settings.dry_run:
        print(f"would verify {folder} and write {folder / verification.FILE_NAME}")
        return 0
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the folder of a converted or finetuned model.")
    record = verification.read(folder)
    changed = list(verification.changes(folder, record)) if record is not None else []
    tokenizer_file, checkpoint_dir = _sources(settings)
    if checkpoint_dir is None and any(".safetensors" in problem for problem in changed):
        raise VerificationError([*changed, "The checkpoint it was made from is needed: pass --input_model_dir."])
    from train.checkpoint import verify

    checks = verify.verify(folder, _source(folder, settings, tokenizer_file, checkpoint_dir))
    print(verify.summary(checks))
    if record is None or changed or tokenizer_file is not None or checkpoint_dir is not None:
        verification.write(folder, checks)
        print(f"wrote {folder / verification.FILE_NAME}")
    else:
        print(f"{folder / verification.FILE_NAME} stands: no file changed, and its source is gone.")
    return 0


def _sources(settings: VerifySettings) -> tuple[Path | None, Path | None]:
    """Tokenizer and checkpoint to compare with: as named, else as the folder's manifest names them, if still there."""
    named: dict[str, Any] = {}
    file = settings.input_tokenizer_and_model_dir / manifest.FILE_NAME
    if file.is_file():
        made_by = manifest.read(file)
        named = made_by["settings"] if made_by["step"] == convert.STEP else {}
        if named:  # the run may have gone on since: the checkpoint is the one that was read
            named |= {"input_model_dir": str(lineage.input_files(made_by)[-1].parent)}
    tokenizer_file, model_dir = settings.input_tokenizer_file, settings.input_model_dir
    if tokenizer_file is None and Path(named.get("input_tokenizer_file", "")).is_file():
        tokenizer_file = Path(named["input_tokenizer_file"])
    if model_dir is None and Path(named.get("input_model_dir", "no such folder")).is_dir():
        model_dir = Path(named["input_model_dir"])
    return tokenizer_file, kind.resolve(model_dir)[0] if model_dir is not None else None


def _source(folder: Path, settings: VerifySettings, tokenizer_file: Path | None, checkpoint_dir: Path | None) -> Any:
    from train.checkpoint import verify
    from train.checkpoint.transformers.export import read_config

    texts: list[str] = []
    texts_from = "none"
    if tokenizer_file is not None:
        read_model(tokenizer_file)
        made_from = [tokenizer_file, *(kind.detect(checkpoint_dir).files if checkpoint_dir else ())]
        records = lineage.trace(made_from)
        texts, texts_from = parity_texts.collect(settings.parity_text_files, records, limit=settings.parity_documents)
    if checkpoint_dir is None:
        return verify.Source(tokenizer_model=tokenizer_file, parity_texts=texts, parity_source=texts_from)
    vocab_size = read_config(folder).vocab_size
    golden_logits = checkpoint_dir / kind.GOLDEN_LOGITS
    return verify.Source(
        weights=lambda: export.weights(checkpoint_dir, vocab_size=vocab_size),
        weights_name=str(checkpoint_dir.name),
        golden_logits=golden_logits if golden_logits.is_file() else None,
        tokenizer_model=tokenizer_file,
        parity_texts=texts,
        parity_source=texts_from,
    )
