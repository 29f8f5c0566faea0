from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_SMALL = ("--device", "cpu", "--micro_batch_size", "1", "--sequence_length", "32", "--hidden_size", "64")
_FEW = ("--head_dims", "32", "--adam_parameters", "500", "--repeats", "2", "--warm_up", "1", "--compiled", "False")


@pytest.fixture
def kernels(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/native_kernels.py as a module."""
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    file = project_root / "benchmarks" / "native_kernels.py"
    spec = importlib.util.spec_from_file_location("native_kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_torchs_kernels_are_measured_and_absent_ones_are_told(
    kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("for machines without GPUs and without flash-attn")
    assert kernels.main([*_SMALL, *_FEW, "--output_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "| causal attention, 1 x 32, 2 heads of 32 | flash-attn | not installed (No module named 'flash_attn')" in shown
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    rows = {(row["kernel"], row["by"]): row for row in results["rows"]}
    measured = {name: row for name, row in rows.items() if "ms" in row}
    assert [name[1] for name in measured] == ["torch", "torch", "torch, flash", "torch AdamW, fused"]
    for row in measured.values():  # bf16 keeps 8 bits, fp32 24; equal to the last bit would be the reference itself
        assert 0 < row["error_of_output"] < (1e-3 if row["kernel"].startswith("Adam") else 1e-2)
        assert row["ms"] > 0 and row["rate"] > 0
    assert rows["rms norm, 32 x 64", "torch"]["error_of_gradients"] < 2e-2


def test_what_computes_something_else_is_far_off(kernels: ModuleType) -> None:
    """The distance must see a gradient that is wrong though the output is right, and an Adam without its decay."""
    torch = pytest.importorskip("torch")
    layer_norm, _ = kernels.norm_kernels(32, 64, device="cpu", compiled=False)

    def without_statistics(values: Any, weight: Any, bias: Any) -> Any:
        mean = values.mean(-1, keepdim=True).detach()
        variance = values.var(-1, keepdim=True, unbiased=False).detach()
        return (values - mean) * (variance + 1e-5).rsqrt() * weight + bias

    output, gradients = layer_norm.errors(without_statistics)
    assert output < 0.02 and gradients > 0.05
    assert layer_norm.errors(layer_norm.contenders["torch"]())[1] < 0.02
    adam = kernels.adam_kernel(500, device="cpu")

    def without_decay(parameters: Any, **options: Any) -> Any:
        return torch.optim.AdamW(parameters, **{**options, "weight_decay": 0.0})

    assert adam.errors(torch.optim.AdamW)[0] < 1e-3 < 5e-3 < adam.errors(without_decay)[0]


def test_a_kernel_that_breaks_is_a_line_and_an_exit_code(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    whole = kernels.adam_kernel

    def breaking(*others: Any, **options: Any) -> Any:
        kernel = whole(*others, **options)
        kernel.contenders["broken"] = lambda: 1 / 0
        return kernel

    monkeypatch.setattr(kernels, "adam_kernel", breaking)
    assert kernels.main([*_SMALL, *_FEW, "--kernels", "adam", "--output_dir", str(tmp_path)]) == 1
    assert "| Adam, 500 parameters | broken | ZeroDivisionError: division by zero |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 4


def test_settings_that_measure_nothing_are_refused(kernels: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    words = ["--kernels", "norm", "--head_dims", "48", "--hidden_size", "64", "--repeats", "0"]
    assert kernels.main(words) == 2
    told = capsys.readouterr().err
    assert "--kernels norm: there are layer_norm" in told and "--head_dims 48: --hidden_size 64" in told
    assert "--repeats 0" in told and ("torch sees no GPU here" in told) != torch.cuda.is_available()
