from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def throughput(project_root: Path) -> ModuleType:
    """benchmarks/pretrain_throughput.py as a module."""
    file = project_root / "benchmarks" / "pretrain_throughput.py"
    spec = importlib.util.spec_from_file_location("pretrain_throughput", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_run_of_which_nothing_would_be_counted_is_refused(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(["--steps", "10", "--dry_run"]) == 2
    assert "--steps 10 --warm_up_steps 10: no step is left to count" in capsys.readouterr().err
    assert throughput.main(["--steps", "11", "--dry_run"]) == 0


def test_the_published_flops_of_a_gpt(throughput: ModuleType) -> None:
    """24 layers x 2,048, vocabulary 32,000, 2,048 tokens: 1,273.5 million weights in matrix products."""
    full, causal = throughput.flops_per_token("gpt_1.3B", 2048)
    attention = 12 * 24 * 2048 * 2048
    assert full == 6 * (24 * 12 * 2048**2 + 32_000 * 2048) + attention
    assert causal == full - attention / 2
