"""Verifies a model folder that is there already, against its source as far as that can still be found.

Called by scripts/step3_upload_pretrained_model/verify_model.py. Writes verification.json into the folder, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import manifest
from train.checkpoint import convert, export, kind, lineage, parity_texts, verification
from train.checkpoint_folders import GOLDEN_LOGITS
from train.errors import UserError, VerificationError
from train.settings import setting
from train.tokenizer.convert import read_model

if TYPE_CHECKING:
    from train.checkpoint.verify import Source

_PARTS = ("weights", "logits", "tokenizer")  # what is compared with a source; the configuration, with the tokenizer
_CONFIG = "config.json"


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

    A record never comes to prove less than before: of an unchanged folder, what cannot be compared again (its source
    is gone) keeps its former proof; a changed one is refused unless all that was proven can be proven again. With no
    source to be found, a folder that never was verified is loaded, computed with and checked in itself, and the
    record says that nothing was compared.

    Raises:
        UserError: the folder or a named source is missing or cannot be read.
        VerificationError: the folder differs from its source, is broken, or changed and cannot be proven again.
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
    if changed and checkpoint_dir is None:
        raise VerificationError(
            [*changed, "The checkpoint it was made from is needed to prove a change: pass --input_model_dir."]
        )
    from train.checkpoint import verify

    source = _source(folder, settings, tokenizer_file, checkpoint_dir)
    if record is not None and changed:
        lost = list(_unprovable(record, source, changed))
        if lost:
            raise VerificationError([*changed, *lost])
    checks = verify.verify(folder, source)
    kept: list[str] = []
    if record is not None and not changed and record.get("passed") is True:
        kept = [part for part in _PARTS if _proves_less(checks[part], record.get(part) or {})]
        checks |= {part: record[part] for part in kept}
    print(verify.summary(checks))
    if len(kept) == len(_PARTS):
        print(f"{folder / verification.FILE_NAME} stands: no file changed, and its source is gone.")
        return 0
    verification.write(folder, checks)
    if kept:
        print(f"no file changed: the former proof of {' and '.join(kept)} stands, as it could not be repeated")
    print(f"wrote {folder / verification.FILE_NAME}")
    return 0


def _unprovable(record: Mapping[str, Any], source: Source, changed: Sequence[str]) -> Iterator[str]:
    """What a changed folder's record proves, or must prove, and the sources at hand cannot."""
    has_other_config = any(f"{_CONFIG} " in problem for problem in changed)
    if source.golden_logits is None and (has_other_config or _is_proven(record.get("logits") or {})):
        yield (
            f"The checkpoint has no {GOLDEN_LOGITS}, so nothing can prove the change: pass the --input_model_dir "
            "that the folder was made from, or convert it again."
        )
    if source.tokenizer_model is None and _is_proven(record.get("tokenizer") or {}):
        yield "The SentencePiece model it was compared with is needed: pass --input_tokenizer_file."


def _is_proven(part: Mapping[str, Any]) -> bool:
    return "compared_with" in part and not str(part["compared_with"]).startswith("none")


def _proves_less(part: Mapping[str, Any], former: Mapping[str, Any]) -> bool:
    """Whether a check compared nothing where the former did or could say why not, or the tokenizer on fewer texts."""
    if not _is_proven(part):
        return "compared_with" in former
    return _is_proven(former) and int(part.get("texts", 0)) < int(former.get("texts", 0))


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


def _source(folder: Path, settings: VerifySettings, tokenizer_file: Path | None, checkpoint_dir: Path | None) -> Source:
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
    golden_logits = checkpoint_dir / GOLDEN_LOGITS
    return verify.Source(
        weights=lambda: export.weights(checkpoint_dir, vocab_size=vocab_size),
        weights_name=str(checkpoint_dir.name),
        golden_logits=golden_logits if golden_logits.is_file() else None,
        tokenizer_model=tokenizer_file,
        parity_texts=texts,
        parity_source=texts_from,
    )
