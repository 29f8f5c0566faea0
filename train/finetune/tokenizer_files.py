"""The tokenizer of a finetuning: copied as it is, grown by a few tokens if asked, and loaded.

copy(tokenizer_dir, folder.tokenizer_dir)
tokenizer = load(folder.tokenizer_dir)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import verification
from train.errors import UserError, first_line


def copy(folder: Path, to: Path) -> None:
    """Copies the tokenizer's files byte for byte. Saved anew by transformers they would tokenize differently."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in verification.TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def add_tokens(tokenizer_dir: Path, tokens: Sequence[str]) -> int:
    """Adds tokens to a copied `tokenizer.json`, after its last id; those it has already are left alone.

    They are added as plain, not as special tokens: a tokenizer with `split_special_tokens`, as ours are, would not
    find them in a text otherwise.

    Returns:
        How many are new.
    """
    file = tokenizer_dir / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    from tokenizers import Tokenizer

    known = Tokenizer.from_str(json.dumps(described)).get_vocab(with_added_tokens=True)
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    if not fresh:
        return 0
    first = max(known.values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    described["added_tokens"] += [{"id": first + n, "content": token, **flags} for n, token in enumerate(fresh)]
    file.write_text(json.dumps(described, ensure_ascii=False, indent=2), encoding="utf-8")
    return len(fresh)


def load(folder: Path) -> Any:
    """The fast tokenizer in `folder`, with an end token.

    Raises:
        UserError: it cannot be loaded, is not a fast one, has no end token, or does not find it in a text.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json: finetuning needs a fast tokenizer; convert the SentencePiece model with "
            "step 3, or pass --tokenizer_name_or_path."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token: the model could not learn where to stop.")
    if tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(
            f"the tokenizer in {folder} reads its end token {tokenizer.eos_token!r} in a text as plain letters, so no "
            "chat text could end: train it with the end token as a user-defined symbol, as step 1 does, or set "
            "split_special_tokens to false in a copy of its tokenizer_config.json."
        )
    return tokenizer


def foreign_note(tokenizer: Any, model_dir: Path) -> str | None:
    """What to tell of a tokenizer whose ids mean something else in the base model's own; None when they agree."""
    if not (model_dir / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab(with_added_tokens=True)
    meant = {number: piece for piece, number in own.items()}
    given = tokenizer.get_vocab()
    others = sum(meant.get(number, piece) != piece for piece, number in given.items())
    if not others:
        return None
    return (
        f"--tokenizer_name_or_path: {others:,} of its {len(given):,} ids mean other pieces in the base model's own "
        "tokenizer, so that the base has learnt nothing about them: leave the flag out, unless that is meant."
    )
