"""Steps 3 and 5: publishes a verified model folder on the Hugging Face Hub, with its card.

Called by the upload scripts of scripts/step3_upload_pretrained_model/ and scripts/step5_upload_finetuned_model/. Only
the model's own files go up, in one commit; blobs that an interrupted upload had sent are not sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train import settings as settings_module
from train.checkpoint import verification
from train.errors import UserError
from train.hub import card
from train.settings import setting

CARD = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
PREPARE_STEP = "prepare_upload"
_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]{0,95}")


@dataclass(frozen=True)
class UploadSettings:
    """The settings of both upload scripts."""

    input_tokenizer_and_model_dir: Path = setting(help="verified model folder to upload")
    output_model_name: str = setting(help="repository: NAME (under your own account) or USER/NAME")
    test_prompt_text: str = setting("Once upon a time,", help="what the model must have an answer to first")
    private: bool | None = setting(None, help="a private repository, as without any flag; False is --public")
    public: bool = setting(False, help="a public repository")
    revision: str = setting("main", help="branch to commit to; made when it does not exist")
    commit_message: str = setting("Upload tokenizer and model", help="first line of the commit")
    license: str = setting("", help="the card's licence, as the Hub spells it (apache-2.0); no field without it")
    base_model: str = setting("", help="the card's base model, a name on the Hub, for a finetuned model")
    output_dir: Path | None = setting(
        None, help="write the files that would go up into this folder instead of uploading them; no network, no token"
    )
    overwrite: bool = setting(False, help="replace an existing --output_dir", flag_only=True)
    dry_run: bool = setting(False, help="list files, sizes, target and card, and exit", flag_only=True)

    @property
    def is_private(self) -> bool:
        return not self.public and self.private is not False

    def problems(self) -> Iterator[str]:
        if self.private and self.public:
            yield "--private and --public exclude each other: choose one."
        name = self.output_model_name
        if not _NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
            yield f"--output_model_name {name!r}: give NAME or USER/NAME, in letters, digits, and - _ . between them."
        if not self.test_prompt_text.strip():
            yield "--test_prompt_text is empty: give the model something to go on with."
        if not self.commit_message.strip():
            yield "--commit_message is empty: say what this upload is."
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.revision) or self.revision.startswith("refs/"):
            yield f"--revision {self.revision!r} is not a branch name: letters, digits, and - _ . / between them."
        if self.output_dir is not None:
            if self.output_dir.name in ("", ".."):
                yield f"--output_dir {self.output_dir}: give the name of a folder to make, such as prepared."
            elif self.output_dir.resolve() == self.input_tokenizer_and_model_dir.resolve():
                yield f"--output_dir {self.output_dir} is the folder to upload: choose another output."


def upload(settings: UploadSettings) -> int:
    """Checks, lets the model speak, and uploads; or, with --output_dir, writes what would go up.

    Raises:
        UserError: the folder is not a proven model, the model says nothing, there is no token, or the Hub refuses.
    """
    folder = settings.input_tokenizer_and_model_dir
    if settings.output_dir is not None and (idle := list(_for_the_hub_only(settings))):
        print(f"note: {', '.join(idle)} had no effect: with --output_dir nothing is sent.")
    if settings.dry_run:
        _print_plan(settings)
        return 0
    verification.require(folder)
    _require_whole(folder)
    text = _card(settings, settings.output_model_name)
    if settings.output_dir is not None:
        with _files(settings) as files:
            return _prepare(settings, settings.output_dir, files, text)
    from train.hub import repository

    target = repository.sign_in(settings.output_model_name)
    _let_speak(settings)
    visibility = "private" if settings.is_private else "public"
    with _files(settings) as files:
        url = repository.publish(
            target,
            files=files,
            card=_card(settings, target),
            is_private=settings.is_private,
            revision=settings.revision,
            commit_message=settings.commit_message,
        )
    print(f"uploaded {folder} to {url} ({visibility}, branch {settings.revision})")
    return 0


def _for_the_hub_only(settings: UploadSettings) -> Iterator[str]:
    """The flags given that only an upload heeds."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name in ("private", "public", "revision", "commit_message"):
        if getattr(settings, name) != defaults[name]:
            yield f"--{name}"


def _card(settings: UploadSettings, name: str) -> str:
    return card.model_card(
        settings.input_tokenizer_and_model_dir,
        repository=name,
        license=settings.license,
        base_model=settings.base_model,
    )


def _require_whole(folder: Path) -> None:
    names = {path.name for path in verification.model_files(folder)}
    is_adapter = _ADAPTER_CONFIG in names  # its base has the rest
    needed = ("adapter_model.safetensors" if is_adapter else "config.json", "tokenizer_config.json")
    missing = [name for name in needed if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors")
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: it is not a whole model; make it again.")


@contextlib.contextmanager
def _files(settings: UploadSettings) -> Iterator[tuple[Path, ...]]:
    """The files that go up. An adapter's configuration names its base: by --base_model, where that is given.

    Raises:
        UserError: an adapter names a folder of this machine, where nobody else finds it.
    """
    files = verification.model_files(settings.input_tokenizer_and_model_dir)
    config = settings.input_tokenizer_and_model_dir / _ADAPTER_CONFIG
    if not config.is_file():
        yield files
        return
    named = json.loads(config.read_text(encoding="utf-8"))
    base = settings.base_model or named.get("base_model_name_or_path") or ""
    if not base or Path(base).is_absolute():
        merged = settings.input_tokenizer_and_model_dir / "merged"
        raise UserError(
            f"the adapter's base is {base or 'not named'}, which nobody finds on the Hub: pass --base_model with the "
            f"base's name there, or upload the merged model{f', {merged}' if merged.is_dir() else ''}."
        )
    with tempfile.TemporaryDirectory() as scratch:
        renamed = Path(scratch) / _ADAPTER_CONFIG
        text = json.dumps(named | {"base_model_name_or_path": base}, indent=2) + "\n"
        renamed.write_text(text, encoding="utf-8")
        yield tuple(renamed if file.name == _ADAPTER_CONFIG else file for file in files)


def _let_speak(settings: UploadSettings) -> None:
    from train.hub import prompt

    said = prompt.answer(settings.input_tokenizer_and_model_dir, settings.test_prompt_text)
    print(f"prompt: {settings.test_prompt_text}\nanswer: {said}")


def _prepare(settings: UploadSettings, output_dir: Path, files: tuple[Path, ...], text: str) -> int:
    """Writes the files that would go up, whole or not at all; a folder that holds just them is left as it is.

    Its manifest stands beside it, as NAME.manifest.json: inside, it would be uploaded with the rest.
    """
    started = time.time()
    record = output_dir.with_name(output_dir.name + ".manifest.json")
    is_there = _holds(output_dir, files, text)
    if is_there and record.is_file():
        print(f"{output_dir} holds these files already: nothing to do.")
        return 0
    if not is_there:  # with them there, a kill left the manifest to be written
        _copy(settings, output_dir, files, text)
    written = sorted(output_dir.iterdir())
    manifest.write(
        record,
        step=PREPARE_STEP,
        settings=settings_module.to_plain(settings),
        inputs=verification.model_files(settings.input_tokenizer_and_model_dir),
        results={"files": len(written), "bytes": sum(path.stat().st_size for path in written)},
        started=started,
    )
    print(f"wrote {output_dir}: {len(written)} files, ready for {settings.output_model_name}; nothing was sent")
    return 0


def _copy(settings: UploadSettings, output_dir: Path, files: tuple[Path, ...], text: str) -> None:
    if output_dir.exists() and not settings.overwrite and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists already: pass --overwrite to replace it, or choose another output.")
    _let_speak(settings)
    with outputs.new_folder(output_dir, overwrite=settings.overwrite) as unfinished:
        for file in files:
            shutil.copyfile(file, unfinished / file.name)
        (unfinished / CARD).write_text(text, encoding="utf-8")


def _holds(output_dir: Path, files: tuple[Path, ...], text: str) -> bool:
    import filecmp

    names = {CARD, *(file.name for file in files)}
    if not output_dir.is_dir() or {path.name for path in output_dir.iterdir()} != names:
        return False
    if (output_dir / CARD).read_text(encoding="utf-8", errors="replace") != text:
        return False
    return all(filecmp.cmp(file, output_dir / file.name, shallow=False) for file in files)


def _print_plan(settings: UploadSettings) -> None:
    """What would go where. Files are told by name and size only: hashing them takes longer than a dry run may."""
    folder = settings.input_tokenizer_and_model_dir
    target: Any = settings.output_dir or settings.output_model_name
    visibility = "a folder here" if settings.output_dir else "private" if settings.is_private else "public"
    print(f"would upload {folder} to {target} ({visibility}, branch {settings.revision}): {settings.commit_message}")
    if not folder.is_dir():
        print("the folder is not there yet, so its files and card cannot be shown")
        return
    for file in verification.model_files(folder):
        print(f"{file.stat().st_size:>16,} bytes  {file.name}")
    try:
        verification.require(folder, hash_files=False)
        print("verified; the files have the sizes they had then")
    except UserError as error:
        print("would be refused: " + " ".join(error.problems))
    if (folder / "config.json").is_file() or (folder / _ADAPTER_CONFIG).is_file():
        print(f"{CARD}:\n{_card(settings, settings.output_model_name)}")
