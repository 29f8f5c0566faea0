"""Uploads with the real huggingface_hub client, to a server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repository

from train.checkpoint import verification

TOKEN = "hf_" + "SecretOfTheTests1234567890"
READ_ONLY_TOKEN = "hf_" + "ReadOnlyOfTheTests1234567"
Upload = Callable[..., "subprocess.CompletedProcess[str]"]
SCRIPTS = (
    "step3_upload_pretrained_model/upload_tokenizer_and_pretrained_model_to_huggingface_hub.py",
    "step5_upload_finetuned_model/upload_tokenizer_and_finetuned_model_to_huggingface_hub.py",
)

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))
"""


def expected_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in verification.model_files(folder)}


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in ("README.md", ".gitattributes")}


def test_only_the_models_files_go_up_to_a_private_repository(
    hub: HubServer, model_folder: Path, upload: Upload
) -> None:
    done = upload("--license", "apache-2.0", "--commit_message", "First weights")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/tiny"]
    assert repository.is_private
    assert repository.messages == ["First weights"]
    files = repository.branches["main"]
    assert without_card(files) == expected_files(model_folder)
    assert sum(name.endswith(".safetensors") for name in files) == 2
    assert b"license: apache-2.0" in files["README.md"]
    assert "me/tiny" in files["README.md"].decode()
    assert f"{hub.url}/me/tiny/tree/main (private" in done.stdout


def test_what_was_uploaded_comes_back_byte_for_byte(
    hub: HubServer, model_folder: Path, upload: Upload, tmp_path: Path
) -> None:
    assert upload().returncode == 0
    environment = {**os.environ, **hub.environment(TOKEN, str(tmp_path / "other_home"))}
    arguments = [sys.executable, "-c", DOWNLOAD, "me/tiny", "main"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    downloaded = Path(done.stdout.strip())
    found = {path.name: path.read_bytes() for path in downloaded.iterdir()}
    assert without_card(found) == expected_files(model_folder)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(downloaded).state_dict()
    assert all(bool((loaded[name] == tensor).all()) for name, tensor in original.items())
    assert AutoTokenizer.from_pretrained(downloaded)("Once upon")["input_ids"] == [64, 65]


@pytest.mark.parametrize("fail_with", [400, None])
def test_an_interrupted_upload_goes_on(
    fail_with: int | None, hub: HubServer, model_folder: Path, upload: Upload
) -> None:
    hub.fail_on, hub.fail_after, hub.fail_with = "PUT /lfs/", 1, fail_with
    done = upload()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert ("connection to the Hub failed" if fail_with is None else "refuses this upload") in done.stderr
    assert hub.repositories["me/tiny"].messages == []
    assert hub.repositories["me/tiny"].branches["main"].keys() == {".gitattributes"}
    (sent_before,) = hub.lfs

    hub.fail_after = None
    before = len(hub.requests)
    assert upload().returncode == 0
    assert without_card(hub.repositories["me/tiny"].branches["main"]) == expected_files(model_folder)
    sent_again = [request for request in hub.requests[before:] if request.startswith("PUT /lfs/")]
    assert len(sent_again) == 1
    assert sent_before not in sent_again[0]


def test_the_same_upload_again_makes_no_commit(hub: HubServer, upload: Upload) -> None:
    assert upload().returncode == 0
    assert upload().returncode == 0
    assert len(hub.repositories["me/tiny"].messages) == 1


def test_public_is_said_and_not_assumed(hub: HubServer, upload: Upload) -> None:
    done = upload("--public")
    assert done.returncode == 0, done.stderr
    assert not hub.repositories["me/tiny"].is_private
    refused = upload()
    assert refused.returncode == 2
    assert "me/tiny exists and is public, this upload is to be private: pass --public" in refused.stderr
    assert upload("--private", "False").returncode == 0
    hub.repositories["me/tiny"].is_private = True
    refused = upload("--public")
    assert refused.returncode == 2
    assert "exists and is private, this upload is to be public: pass --private" in refused.stderr


def test_a_revision_is_a_branch_of_its_own(hub: HubServer, model_folder: Path, upload: Upload) -> None:
    done = upload("--revision", "step100", name="me/tiny")
    assert done.returncode == 0, done.stderr
    branches = hub.repositories["me/tiny"].branches
    assert without_card(branches["step100"]) == expected_files(model_folder)
    assert branches["main"].keys() == {".gitattributes"}
    assert upload("--revision", "step100").returncode == 0
    refused = upload("--revision", "x.lock")
    assert refused.returncode == 2
    assert "check --revision" in refused.stderr
    assert "Invalid branch name" in refused.stderr


def test_weights_of_an_earlier_upload_do_not_stay(hub: HubServer, model_folder: Path, upload: Upload) -> None:
    branches = {"main": {".gitattributes": b"", "model.safetensors": b"old", "notes.txt": b"mine"}}
    hub.repositories["me/tiny"] = Repository(is_private=True, branches=branches)
    assert upload().returncode == 0
    files = hub.repositories["me/tiny"].branches["main"]
    assert "model.safetensors" not in files
    assert files["notes.txt"] == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "hf_nobodys"}, "does not accept the token (401)"),
        ({"token": READ_ONLY_TOKEN}, "may not write to me/tiny (403)"),
        ({"name": "somebody/tiny"}, "may not write to somebody/tiny (403)"),
        ({"token": "hf_あ"}, "the token is not valid"),
        ({"token": ""}, "run `hf auth login`, or set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection to the Hub failed"),
    ],
)
def test_what_the_hub_refuses_is_said_clearly(
    arguments: dict[str, str], message: str, hub: HubServer, upload: Upload
) -> None:
    done = upload(**arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("status", "message"), [(404, "does not find me/tiny"), (413, "the Hub answers with 413"), (409, "refuses")]
)
def test_a_refusal_in_the_middle_is_said_clearly(status: int, message: str, hub: HubServer, upload: Upload) -> None:
    hub.fail_on, hub.fail_after, hub.fail_with = "/commit/", 0, status
    done = upload()
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories["me/tiny"].messages == []


def test_a_licence_that_the_hub_does_not_know_is_refused(hub: HubServer, upload: Upload) -> None:
    done = upload("--license", "nonsense")
    assert done.returncode == 2
    assert '"license" must be one of [apache-2.0, mit]' in done.stderr
    assert hub.repositories["me/tiny"].messages == []


def test_a_full_storage_is_said_clearly(hub: HubServer, upload: Upload) -> None:
    hub.is_full = True
    done = upload()
    assert done.returncode == 2
    assert "Private repository storage limit reached" in done.stderr
    assert "Traceback" not in done.stderr


def remove_record(folder: Path) -> None:
    (folder / "verification.json").unlink()


def fail_record(folder: Path) -> None:
    (folder / "verification.json").write_text(json.dumps({"passed": False, "files": {}}))


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def add_a_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def lose_the_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    verification.write(folder, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_record, "has no verification.json"),
        (fail_record, "did not pass"),
        (flip_a_bit, "changed after the verification"),
        (add_a_template, "came after the verification"),
        (lose_the_weights, "lacks model.safetensors"),
    ],
)
def test_an_unproven_folder_is_refused_before_anything_is_sent(
    spoil: Callable[[Path], None], message: str, hub: HubServer, model_folder: Path, upload: Upload
) -> None:
    spoil(model_folder)
    done = upload()
    assert done.returncode == 2
    assert message in done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--output_model_name", "a/b/c", "give NAME or USER/NAME"),
        ("--output_model_name", "a--b", "give NAME or USER/NAME"),
        ("--test_prompt_text", " ", "--test_prompt_text is empty"),
        ("--commit_message", "", "--commit_message is empty"),
        ("--revision", "a b", "is not a branch name"),
        ("--revision", "refs/pr/1", "is not a branch name"),
        ("--private", "--public", "exclude each other"),
        ("--output_dir", "/", "--output_dir /: give the name of a folder"),
        ("--output_dir", "..", "--output_dir ..: give the name of a folder"),
    ],
)
def test_bad_settings_are_refused(flag: str, value: str, message: str, hub: HubServer, upload: Upload) -> None:
    done = upload(flag, value)
    assert done.returncode == 2
    assert message in done.stderr
    assert hub.requests == []


def test_the_folder_to_upload_is_no_output(hub: HubServer, model_folder: Path, upload: Upload) -> None:
    before = expected_files(model_folder)
    done = upload("--output_dir", str(model_folder), "--overwrite")
    assert done.returncode == 2
    assert "is the folder to upload: choose another output" in done.stderr
    assert expected_files(model_folder) == before


def test_files_can_be_prepared_without_network_or_token(
    hub: HubServer, model_folder: Path, upload: Upload, tmp_path: Path
) -> None:
    output = tmp_path / "prepared"
    arguments = ["--output_dir", str(output)]
    done = upload(*arguments, token="", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert without_card(written) == expected_files(model_folder)
    assert b"4,321" in written["README.md"]
    results = json.loads((tmp_path / "prepared.manifest.json").read_text())["results"]
    assert results == {"files": len(written), "bytes": sum(map(len, written.values()))}
    again = upload(*arguments, token="")
    assert "nothing to do" in again.stdout
    (tmp_path / "prepared.manifest.json").unlink()  # as a kill between the two leaves it
    assert upload(*arguments, token="").returncode == 0
    assert (tmp_path / "prepared.manifest.json").is_file()
    (output / "mine.txt").write_text("mine")
    refused = upload(*arguments, token="")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (output / "mine.txt").is_file()
    assert upload(*arguments, "--overwrite", token="").returncode == 0
    assert {path.name for path in output.iterdir()} == written.keys()
    assert hub.requests == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_shows_all_and_needs_neither_network_nor_torch(
    script: str, launch: Any, model_folder: Path, tmp_path: Path
) -> None:
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir()
    for module in ("torch", "transformers"):
        (forbidden / f"{module}.py").write_text("raise SystemExit(99)")
    arguments = ("--input_tokenizer_and_model_dir", model_folder, "--output_model_name", "me/tiny", "--dry_run")
    environment = {"PYTHONPATH": str(forbidden), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}
    done = launch(script, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "to me/tiny (private, branch main)" in done.stdout
    for file in verification.model_files(model_folder):
        assert f"{file.stat().st_size:,} bytes  {file.name}" in done.stdout
    assert "optimizer.pt" not in done.stdout
    assert "## Training data" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    (model_folder / "verification.json").unlink()
    done = launch(script, *arguments, environment=environment)
    assert "would be refused" in done.stdout
    missing = (*arguments[:1], tmp_path / "nowhere", *arguments[2:])
    done = launch(script, *missing, environment=environment)
    assert done.returncode == 0
    assert "is not there yet" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launchers_let_the_model_speak_and_upload(
    script: str, launch: Any, hub: HubServer, model_folder: Path, tmp_path: Path
) -> None:
    """The seeds' command, word for word."""
    done = launch(
        script,
        *("--input_tokenizer_and_model_dir", model_folder, "--output_model_name", "tiny"),
        *("--test_prompt_text", "Once upon"),
        environment=hub.environment(TOKEN, str(tmp_path / "hf_home")),
    )
    assert done.returncode == 0, done.stderr
    assert "prompt: Once upon\nanswer: " in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    stored = without_card(hub.repositories["me/tiny"].branches["main"])
    assert stored == expected_files(model_folder)
    record = json.loads((model_folder / "verification.json").read_text())
    assert {name: hashlib.sha256(data).hexdigest() for name, data in stored.items()} == {
        name: entry["sha256"] for name, entry in record["files"].items()
    }


def test_flags_that_only_an_upload_heeds_are_told(upload: Upload, tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path / "prepared"), "--dry_run"]
    told = upload(*arguments, "--public", "--revision", "v2", "--commit_message", "Mine", token="").stdout
    assert "note: --public, --revision, --commit_message had no effect: with --output_dir nothing is sent." in told
    assert "note: --private had no effect" in upload(*arguments, "--private", token="").stdout
    assert "had no effect" not in upload(*arguments, token="").stdout
