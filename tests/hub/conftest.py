"""A verified model folder, a Hub on 127.0.0.1, and ways to upload to it with the real client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from train import manifest
from train.checkpoint import verification

TOKEN = "hf_" + "SecretOfTheTests1234567890"
READ_ONLY_TOKEN = "hf_" + "ReadOnlyOfTheTests1234567"

# The upload as the launchers do it, except that the model need not speak (which takes torch) and that a lost
# connection is tried again without waiting.
UPLOAD_WITHOUT_TORCH = """
import sys, time
time.sleep = lambda seconds: None
from train import cli
from train.hub import prompt
from train.hub.upload import UploadSettings, upload
prompt.answer = lambda folder, text: "spoken"
sys.exit(cli.run(UploadSettings, upload, sys.argv[1:], description="", example=""))
"""


@pytest.fixture(scope="session")
def model_folder_of_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of some megabytes in two shards, verified, with manifests behind it and training state beside it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = ["<unk>", "<s>", "</s>", "<pad>", "<EOD>", *(f"word{n}" for n in range(59)), "Once", "upon"]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **named).save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(3)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=192, n_positions=64, vocab_size=len(words), **ids)
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="2MB")
    write_manifests(folder)
    weights = {"compared_with": "global_step100", "parameters": 123456, "max_abs_difference": 0.0}
    verification.write(folder, {"weights": weights})
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "log").mkdir()
    (folder / "log" / "config.json").write_text("{}")
    return folder


def write_manifests(folder: Path) -> None:
    """The folder's manifest with those of pretraining, data and tokenizer inside, as step 3 writes it."""
    lineage = [
        {
            "step": "pretrain_model",
            "finished_at": "2024-01-03T00:00:00Z",
            "settings": {"training": {"lr": 0.002, "global_batch_size": 1536}, "output_model_dir": "/home/someone/run"},
            "inputs": [{"path": "/home/someone/corpus.idx", "bytes": 1}],
            "results": {
                "engine": "transformers",
                "tokens": 1234567,
                "layout": {"world_size": 2, "zero_stage": 1, "device": "cpu"},
                "last_loss": 3.25,
                "checkpoint": "/home/someone/run/checkpoint/tiny/global_step100",
                "loss_curve": [[step, 9 - step / 20] for step in range(1, 101)],
            },
            "software": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        },
        {
            "step": "preprocess_data",
            "finished_at": "2024-01-02T00:00:00Z",
            "settings": {"json_key": "text"},
            "inputs": [{"path": "/home/someone/wikipedia.jsonl", "bytes": 1}],
            "results": {"documents": 4321, "tokens": 7654321, "tokenizer_sha256": "0123abcd"},
            "software": {"sentencepiece": "0.2.3"},
        },
        {
            "step": "train_tokenizer",
            "finished_at": "2024-01-01T00:00:00Z",
            "settings": {},
            "inputs": [],
            "results": {"vocab_size": 66, "characters_per_token": 3.5},
            "software": {"sentencepiece": "0.2.3"},
        },
    ]
    manifest.write(
        folder / "manifest.json",
        step="convert_to_huggingface",
        settings={"input_model_dir": "/home/someone/run"},
        inputs=[],
        results={"parameters": 123456, "lineage": lineage},
        started=time.time(),
    )


@pytest.fixture
def model_folder(model_folder_of_session: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(model_folder_of_session, tmp_path / "tiny"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    users = {TOKEN: "me", READ_ONLY_TOKEN: "me"}
    with HubServer(users=users, read_only_tokens=(READ_ONLY_TOKEN,)) as server:
        yield server


Upload = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def upload(hub: HubServer, model_folder: Path, tmp_path: Path) -> Upload:
    """Uploads the folder to the server; what was printed, and every file left, must not hold the token."""

    def run(*arguments: object, token: str = TOKEN, name: str = "tiny", **environment: str) -> Any:
        home = tmp_path / "hf_home"
        variables = {**os.environ, **hub.environment(token, str(home)), **environment}
        done = subprocess.run(
            [
                *(sys.executable, "-c", UPLOAD_WITHOUT_TORCH, "--output_model_name", name),
                *("--input_tokenizer_and_model_dir", str(model_folder), *map(str, arguments)),
            ],
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        refuse_secrets(done, tmp_path)
        return done

    return run


def refuse_secrets(done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    for secret in (TOKEN, READ_ONLY_TOKEN):
        assert secret not in done.stdout + done.stderr
        for folder in folders:
            for file in folder.rglob("*"):
                assert not file.is_file() or secret.encode() not in file.read_bytes(), file
