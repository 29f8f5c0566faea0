"""The command that makes the parity table: its mistakes are mistakes, its table is honest, and one cell is run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.checkpoint.megatron.merge import PER_HEAD, PER_RANK
from train.engine.megatron_deepspeed import checkout


@pytest.fixture
def parity(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    return importlib.import_module("export_parity")


@pytest.fixture
def wrong_exports(parity: Any) -> Any:
    return parity.wrong_exports


def test_rows_are_read_as_the_engines_keep_them(wrong_exports: Any) -> None:
    heads, head_dim = 4, 3
    orders = wrong_exports.reading_order(heads, heads, head_dim, ranks=2)
    rows = heads * head_dim
    # [heads, 3, head_dim], and [ranks, 3, heads of a rank, head_dim], of rows numbered query, key, value
    numbered = importlib.import_module("torch").arange(3 * rows).view(3, heads, head_dim)
    assert orders[PER_HEAD].tolist() == numbered.transpose(0, 1).flatten().tolist()
    assert orders[PER_RANK].tolist() == numbered.view(3, 2, -1).transpose(0, 1).flatten().tolist()
    grouped = wrong_exports.reading_order(4, 2, 1, ranks=1)  # two groups: two queries, a key and a value each
    assert grouped[PER_HEAD].tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert grouped[PER_RANK].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_mistake_shows_and_the_right_model_does_not(
    architecture: str, wrong_exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, **sizes)
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(wrong_exports.verify, "load", lambda _folder: (model, None))
    input_ids = torch.arange(16).unsqueeze(0)
    golden = model(input_ids).logits.detach()
    monkeypatch.setattr(wrong_exports.verify, "read_golden_logits", lambda _file: (input_ids, golden, None))
    assert wrong_exports.relative_difference(golden, golden) == 0
    found = wrong_exports.mistakes(tmp_path, tmp_path, qkv_layout=PER_HEAD, tensor_parallel_size=1)
    assert found[wrong_exports.QKV] > 0.1
    assert found[wrong_exports.ACTIVATION] > (1e-5 if architecture == "gpt2" else 0.1)


def test_the_table_says_what_does_not_run_and_the_least_of_the_mistakes(parity: Any) -> None:
    names = (parity.wrong_exports.QKV, parity.wrong_exports.ACTIVATION)
    cells = {
        ("GPT", "TP1", "aaaaaaaa"): parity.Cell(5.2e-7, dict(zip(names, (1.0, 2e-3), strict=True)), ""),
        ("GPT", "TP1", "bbbbbbbb"): parity.Cell(6e-7, dict(zip(names, (0.5, 3e-3), strict=True)), ""),
        ("GPT", "TP2", "aaaaaaaa"): parity.Cell(None, {}, "does not run: a reason"),
        ("GPT", "TP2", "bbbbbbbb"): parity.Cell(0.0, {}, ""),
    }
    assert parity.table(cells).splitlines()[2:] == [
        "| GPT | TP1 | 5.2e-07 | 6.0e-07 | *5.0e-01* | *2.0e-03* |",
        "| GPT | TP2 | (1) | 0 |  |  |",
        "",
        "(1) does not run: a reason",
    ]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("x\n[rank1]: RuntimeError: no '[2|3]'  here\nerror: rank 1 failed", "RuntimeError: no '[2/3]' here"),
        ("a line\nerror: no checkout is there\n", "no checkout is there"),
        ("a line\n", "exit code 137 without a message"),
    ],
)  # fmt: skip
def test_reasons_are_taken_from_what_was_printed(output: str, told: str, parity: Any) -> None:
    assert parity.reason(output, 137) == told


def test_what_there_is_not_is_refused(parity: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--layouts", "TP3", "--architectures", "BERT"]) == 2
    told = capsys.readouterr().err
    assert "--layouts TP3: it is one of TP1; TP2;" in told and "--architectures BERT: it is one of GPT" in told
    assert parity.main(["--engine_dirs", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "no installed Megatron-DeepSpeed; run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.megatron
@pytest.mark.xdist_group("megatron_engine")
def test_one_cell_is_run_and_not_run_again(project_root: Path, tmp_path: Path) -> None:
    if checkout.find_checkout() is None:
        pytest.skip(checkout.why_missing())
    command = [sys.executable, project_root / "benchmarks" / "export_parity.py", "--output_dir", tmp_path]
    command += ["--architectures", "GPT", "--layouts", "TP2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "| GPT | TP2 | " in done.stdout, done.stdout + done.stderr
    (record,) = (tmp_path / "cells").iterdir()
    cell = json.loads(record.read_text())
    assert cell["difference"] < 1e-5 and all(value > 1e-4 for value in cell["mistakes"].values())
    assert not list(tmp_path.glob("GPT-*"))  # the run's own folder is gone
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "..." not in again.stdout and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
