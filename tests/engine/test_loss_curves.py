from __future__ import annotations

import importlib
import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from train.engine.megatron_deepspeed import patches
from train.errors import UserError
from train.process import Command


@pytest.fixture
def loss_curves(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/loss_curves.py as a module."""
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    return importlib.import_module("loss_curves")


def curve(steps: int = 500) -> list[float]:
    noise = random.Random(1)
    return [3 + 5 / (1 + step / 50) + noise.uniform(-0.05, 0.05) for step in range(steps)]


def test_equal_curves_do_not_differ(loss_curves: ModuleType) -> None:
    found = loss_curves.difference(curve(), curve())
    assert found["final_difference_percent"] == found["largest_smoothed_difference_percent"] == 0
    assert found["drift_percent_points"] == 0 and found["final_patched"] == pytest.approx(3.48, abs=0.03)


def test_a_constant_factor_is_a_difference_without_drift(loss_curves: ModuleType) -> None:
    found = loss_curves.difference([1.01 * loss for loss in curve()], curve())
    assert found["final_difference_percent"] == pytest.approx(1)
    assert found["drift_percent_points"] == pytest.approx(0, abs=1e-9)


def test_curves_that_part_drift(loss_curves: ModuleType) -> None:
    parting = [loss * (1 + 0.01 * step / 500) for step, loss in enumerate(curve())]
    found = loss_curves.difference(parting, curve())
    assert found["largest_smoothed_difference_percent"] == pytest.approx(0.97, abs=0.01)
    assert found["drift_percent_points"] > 0.3


@pytest.mark.parametrize(("first", "second"), [([1.0] * 3, [1.0] * 3), ([1.0] * 9, [1.0] * 8)])
def test_runs_that_cannot_be_compared(loss_curves: ModuleType, first: list[float], second: list[float]) -> None:
    with pytest.raises(UserError, match="same length"):
        loss_curves.difference(first, second)


def test_the_plot_is_a_file_of_its_own(loss_curves: ModuleType) -> None:
    drawn = loss_curves.plot("gpt_0.125B", {"patched": curve(50), "unpatched": curve(50)})
    assert drawn.startswith("<svg xmlns=") and drawn.rstrip().endswith("</svg>")
    assert re.findall(r'data-name="(\w+)"', drawn) == ["patched", "unpatched"]
    assert ">patched</text>" in drawn and ">unpatched</text>" in drawn


@pytest.fixture
def commands(loss_curves: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """The commands of the runs, none of which is started."""
    found: list[Command] = []

    def capture(command: Command, *, timeout_s: float = 60.0) -> tuple[int, str]:
        found.append(command)
        assert timeout_s > 3600, "500 steps take longer than a minute"
        folder = Path(command.argv[command.argv.index("--output_model_dir") + 1])
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "metrics").mkdir()
        losses = curve(20) if len(found) == 1 else [1.001 * loss for loss in curve(20)]
        (folder / "metrics" / "run.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
        return 0, ""

    monkeypatch.setattr(loss_curves.process, "capture", capture)
    return found


def words(output_dir: Path, *more: str) -> list[str]:
    given = ["--input_tokenizer_file", "t.model", "--data_path", "d", "--output_dir", str(output_dir), "--steps", "20"]
    return [*given, *more]


def test_both_runs_have_their_time_and_their_patches(
    loss_curves: ModuleType, commands: list[Command], tmp_path: Path
) -> None:
    assert loss_curves.main(words(tmp_path)) == 0
    patched, unpatched = commands
    switched_off = patches.disabled_names(unpatched.environment)  # all are names of patches
    assert {"compiled-layers", "gradient-reduction"} <= switched_off and not patches.disabled_names(patched.environment)
    found = json.loads((tmp_path / "loss_curves.json").read_text())
    assert found["final_difference_percent"] == pytest.approx(100 * (1 / 1.001 - 1))  # the patched one, by the other


def test_a_run_with_other_flags_is_compared_with_the_defaults(
    loss_curves: ModuleType, commands: list[Command], tmp_path: Path
) -> None:
    assert loss_curves.main(words(tmp_path, "--other_flags", "--float8 True")) == 0
    defaults, other = commands
    assert not patches.disabled_names(defaults.environment) and not patches.disabled_names(other.environment)
    at = other.argv.index("--float8")
    assert other.argv[at + 1] == "True" and "--float8" not in defaults.argv
    folder = defaults.argv.index("--output_model_dir") + 1
    assert defaults.argv[folder] != other.argv[folder]
    found = json.loads((tmp_path / "loss_curves.json").read_text())
    assert list(found["losses"]) == ["defaults", "--float8 True"]
    assert found["final_other_flags"] == pytest.approx(1.001 * found["final_defaults"])
    assert found["final_difference_percent"] == pytest.approx(0.1)
    assert ">--float8 True</text>" in (tmp_path / "loss_curves.svg").read_text()


def test_what_is_asked_wrongly_is_told_at_once(loss_curves: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--gpus", "0", "--switched_off", "float8", "--other_flags", "--float8 True"]
    assert loss_curves.main(["--input_tokenizer_file", "t.model", "--data_path", "d", "--steps", "2", *more]) == 2
    said = capsys.readouterr().err
    assert "--steps 2" in said and "--gpus 0" in said and "--other_flags --switched_off" in said


def test_each_run_is_given_as_many_gpus_as_it_has_processes(
    loss_curves: ModuleType, commands: list[Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--flags", "--sequence_length 64 --global_batch_size 4 --num_processes 2"]
    assert loss_curves.main(words(tmp_path, *two, "--gpus", "0", "1")) == 2
    assert "--gpus 0 1: the run on 1 has --num_processes 2; name so many GPUs for it" in capsys.readouterr().err
    assert loss_curves.main(words(tmp_path, *two, "--gpus", "0,1", "2,3")) == 0
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0,1", "2,3"]
    other = ["--other_flags=--num_processes=2"]
    assert loss_curves.main(words(tmp_path, *other, "--gpus", "0", "1")) == 2
    assert "the run on 1 has --num_processes 2" in capsys.readouterr().err
    assert loss_curves.main(words(tmp_path, *other, "--gpus", "0", "1,2")) == 0
