"""The Hub's side of an upload, through huggingface_hub, its refusals turned into messages one can act on.

    name = sign_in("NAME")  # USER/NAME
    url = publish(name, files=..., card=..., is_private=True, revision="main", commit_message="...")

The token is read by huggingface_hub itself (HF_TOKEN or `hf auth login`) and appears nowhere here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.checkpoint import verification
from train.errors import UserError


def sign_in(name: str) -> str:
    """The full name USER/NAME of the repository, once the Hub has accepted the token.

    Raises:
        UserError: there is no token, the Hub refuses it, or the Hub cannot be reached.
    """
    import huggingface_hub

    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "there is no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to one with write "
            "permission (https://huggingface.co/settings/tokens)."
        )
    if not token.isascii():  # it cannot even be sent: the client would end in a UnicodeEncodeError
        raise UserError("the token is not valid, it holds letters that no token has: set HF_TOKEN to a whole one.")
    with _clear_errors(name):
        user = huggingface_hub.whoami()["name"]
    return name if "/" in name else f"{user}/{name}"


def publish(
    name: str, *, files: Sequence[Path], card: str, is_private: bool, revision: str, commit_message: str
) -> str:
    """Makes the repository and the branch when they do not exist, and commits the files and the card in one commit.

    Weights that an earlier upload left there under other names (another number of shards) go with the same commit:
    they would be loaded instead of these.

    Args:
        name: USER/NAME.
        files: the model's files; they lie at the top of the repository.
        card: the text of README.md.
        is_private: what the repository is to be; an existing one that is otherwise is not touched.
        revision: the branch.
        commit_message: the commit's first line.

    Returns:
        The address of the repository's branch.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _clear_errors(name):
        address = api.create_repo(name, private=is_private, exist_ok=True)
        if bool(api.repo_info(name).private) != is_private:
            exists, wanted = ("public", "private") if is_private else ("private", "public")
            raise UserError(
                f"{name} exists and is {exists}, this upload is to be {wanted}: pass --{exists} to upload there all "
                "the same, or choose another --output_model_name."
            )
        if revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        kept = {file.name for file in files}
        stale = [
            path
            for path in api.list_repo_files(name, revision=revision)
            if verification.is_model_file(path) and path not in kept
        ]
        api.create_commit(
            name,
            [
                CommitOperationAdd("README.md", card.encode()),
                *(CommitOperationAdd(file.name, str(file)) for file in files),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=commit_message,
            revision=revision,
        )
    return f"{address}/tree/{revision}"


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turns what the client raises into one sentence of what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or use --output_dir.") from None
    except (errors.HTTPError, RuntimeError) as error:
        refused = _first(error, errors.HfHubHTTPError)
        if refused is not None:
            raise UserError(_refusal(name, refused.response.status_code, refused.server_message or "")) from None
        failed = _first(error, errors.HTTPError)
        if failed is None:
            raise
        raise UserError(
            f"the connection to the Hub failed ({failed or type(failed).__name__}): run the same command again when "
            "it is back; what was sent is not sent again."
        ) from None
    except ValueError as error:  # the card's header, or the storage of large files (a quota, for instance)
        said = " ".join(str(error).split())
        if _first(error, errors.HfHubHTTPError) is None and not said.startswith("LFS batch API"):
            raise
        hint = "--license and --base_model shape the card"
        raise UserError(f"the Hub refuses this upload to {name}: {said} ({hint}).") from None


def _first(error: BaseException | None, kind: type[Any]) -> Any:
    """The first exception of that kind among `error` and its causes, or None."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _refusal(name: str, status: int, said: str) -> str:
    """What an HTTP status of the Hub means for an upload."""
    answer = f" (the Hub says: {' '.join(said.split())})" if said.strip() else ""
    if status == 401:
        return f"the Hub does not accept the token (401){answer}: run `hf auth login` again, or renew HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to {name} (403){answer}: use a token with write permission, or a repository of "
            "your own in --output_model_name."
        )
    if status == 404:
        return f"the Hub does not find {name} or its branch (404){answer}: check --output_model_name and --revision."
    if status in (400, 409, 422):
        return f"the Hub refuses this upload to {name} ({status}){answer}: check --revision, --license, --base_model."
    return f"the Hub answers with {status}{answer}: run the same command again later; what was sent is not sent again."
