"""Measuring for real, on this machine's CPU: several nodes, one node before a run, and the launcher of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_cluster import SmallCluster, wait_until  # type: ignore[import-not-found]

from train.cluster import launch, measure, slow_nodes
from train.cluster.allocation import Allocation
from train.cluster.measure_nodes import MeasureSettings, measure_nodes
from train.cluster.settings import ClusterSettings
from train.cluster.slow_nodes import RankFigures
from train.errors import UserError
from train.process import Command
from train.settings import parse

HERE = Allocation(("localhost",), 2, "cpu", "for the test")
TWO = Allocation(("node1", "node2"), 4, "cuda", "for the test")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    made = SmallCluster(tmp_path)
    yield made
    made.close()


def test_bus_bandwidth_does_not_depend_on_the_number_of_ranks():
    """Of 2 ranks each sends its message once and gets one; of many, almost twice."""
    assert measure.bus_gb_per_s(10**9, 2, 1.0) == pytest.approx(1.0)
    assert measure.bus_gb_per_s(10**9, 1000, 1.998) == pytest.approx(1.0)


def test_figures_that_cannot_be_read_are_told(tmp_path):
    for text in (None, "[", '[{"unknown": 1}]', "3"):
        if text is not None:
            (tmp_path / "figures.json").write_text(text)
        with pytest.raises(UserError, match=r"figures\.json cannot be read"):
            measure.read(tmp_path / "figures.json")


def plan(folder: Path, where: Allocation = HERE, **cluster: object) -> launch.Plan:
    command = Command((sys.executable, "-c", "print('the run itself')"))
    settings = ClusterSettings(**{"preflight": "measure", **cluster})  # type: ignore[arg-type]
    return launch.plan(command, where, settings, launch_dir=folder / "launch", job_name="tiny")


def test_the_measurement_goes_the_way_of_the_run(tmp_path):
    made = plan(tmp_path, TWO, launcher="ssh", starter="torchrun", time_budget_min=5, ssh_port=2222)
    first = made.measurement
    assert first is not None and first.measurement is None
    assert first.job.nodes == made.job.nodes and first.job.processes == made.job.processes
    assert first.job.name != made.job.name, "its port may not be free again at once"
    assert first.job.starter == "own" and "TRAIN_END_BY" not in first.job.environment
    assert "2222" in first.files[tmp_path / "launch" / "measure" / "ssh_config"]
    assert list(first.job.argv[1:]) == [
        "-m", "train.cluster.measure", "--device", "cuda", "--figures", str(tmp_path / "launch/measure/figures.json"),
    ]  # fmt: skip
    assert made.text().index("train.cluster.measure") < made.text().index("the run itself")
    for how in ("check", "warn"):
        assert plan(tmp_path, preflight=how).measurement is None


@pytest.mark.slow
def test_three_nodes_meet_both_neighbours(cluster, tmp_path):
    """In three rounds, in each of which one node has no neighbour; and what all ranks have timed arrives."""
    words = ["--device", "cpu", "--figures", str(tmp_path / "figures.json")]
    rank = f"from train.cluster import measure; raise SystemExit(measure.main({words!r}))"
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    end = cluster.run(rank, nodes=3, environment=environment)
    assert end.exit_status == 0, end
    figures = measure.read(tmp_path / "figures.json")
    assert len(figures) == 3
    for found in figures:
        assert 1e-5 < found.matrix_product_tflops < 10 and found.all_reduce_in_node_gb_per_s is None
        rates = [*found.all_reduce_with_neighbours_gb_per_s, found.all_reduce_over_all_gb_per_s]
        assert len(rates) == 3 and all(rate is not None and 1e-4 < rate < 1000 for rate in rates)
    assert len(slow_nodes.compare(figures, nodes=("a", "b", "c"), device="cpu").nodes) == 3


@pytest.mark.slow
def test_a_run_starts_after_its_measurement(tmp_path, capfd):
    end = launch.run(plan(tmp_path), log=tmp_path / "run.log")
    assert end == launch.End(0, ""), end
    assert (tmp_path / "run.log").read_text().splitlines() == ["the run itself"] * 2
    assert "matrix product (GFLOP/s)  all-reduce in the node (GB/s)\nlocalhost" in capfd.readouterr().out


def measured(monkeypatch: pytest.MonkeyPatch, *products: float) -> None:
    """Ranks that find these figures at once: what was timed is replaced, all else is real."""
    text = json.dumps([{"matrix_product_tflops": product} for product in products])
    code = f"import os, sys; os.environ['RANK'] == '0' and open(sys.argv[1], 'w').write({text!r})"
    monkeypatch.setattr(measure, "build_command", lambda _, file: Command((sys.executable, "-c", code, str(file))))


def test_a_slow_gpu_keeps_the_run_from_starting(tmp_path, capfd, monkeypatch):
    measured(monkeypatch, 700, 300)
    made = plan(tmp_path)
    report = slow_nodes.compare([RankFigures(700), RankFigures(300)], nodes=("localhost",), device="cuda")
    monkeypatch.setattr(slow_nodes, "compare", lambda *_, **__: report)  # this machine has no GPUs to be slow
    end = launch.run(made, log=tmp_path / "run.log")
    assert end.exit_status == 2
    assert end.text.startswith("localhost: GPU 1 below 80%")
    assert end.text.endswith("--preflight check starts without measuring.")
    assert "the run itself" not in (tmp_path / "run.log").read_text()
    capfd.readouterr()


def test_a_measurement_that_fails_keeps_the_run_from_starting(tmp_path, capfd, monkeypatch):
    code = "raise SystemExit('no memory left on this GPU')"
    monkeypatch.setattr(measure, "build_command", lambda *_: Command((sys.executable, "-c", code)))
    end = launch.run(plan(tmp_path), log=tmp_path / "run.log")
    assert end.exit_status == 1 and end.text.endswith("no memory left on this GPU")
    capfd.readouterr()


def settings(folder: Path, **given: object) -> MeasureSettings:
    return MeasureSettings(**{"output": folder / "out" / "m.json", "num_processes": 2, "device": "cpu", **given})  # type: ignore[arg-type]


def test_a_dry_run_writes_nothing(tmp_path, capfd):
    assert measure_nodes(settings(tmp_path, dry_run=True)) == 0
    assert "train.cluster.measure --device cpu" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_nothing_is_measured(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.json").write_text("mine")
    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("it measured"))
    with pytest.raises(UserError, match="--overwrite"):
        measure_nodes(settings(tmp_path))
    assert (tmp_path / "out" / "m.json").read_text() == "mine"


def test_fewer_than_no_processes_are_refused(tmp_path):
    with pytest.raises(UserError, match="--num_processes -1: it must be 0 or more"):
        parse(MeasureSettings, ["--num_processes", "-1"], program="measure_nodes.py", description="", example="")


def test_a_rank_that_fails_leaves_no_file(tmp_path, capfd, monkeypatch):
    code = "raise SystemExit('no memory left on this GPU')"
    monkeypatch.setattr(measure, "build_command", lambda *_: Command((sys.executable, "-c", code)))
    with pytest.raises(UserError, match="no memory left on this GPU") as caught:
        measure_nodes(settings(tmp_path))
    assert caught.value.exit_code == 1
    assert list((tmp_path / "out").iterdir()) == []
    capfd.readouterr()


@pytest.mark.parametrize("preflight", ["check", "warn"])
def test_slow_nodes_are_written_told_and_refused(tmp_path, capfd, monkeypatch, preflight):
    measured(monkeypatch, 700, 300)
    real = slow_nodes.compare  # of this machine's CPU, GPUs would not be judged
    monkeypatch.setattr(slow_nodes, "compare", lambda ranks, *, nodes, device: real(ranks, nodes=nodes, device="cuda"))
    wanted = settings(tmp_path, cluster=ClusterSettings(preflight=preflight))
    if preflight == "warn":
        assert measure_nodes(wanted) == 0
        assert "GPU 1 below 80%" in capfd.readouterr().out
    else:
        with pytest.raises(UserError, match="GPU 1 below 80%") as caught:
            measure_nodes(wanted)
        assert caught.value.exit_code == 2
    record = json.loads((tmp_path / "out" / "m.json").read_text())
    assert len(record["slow_nodes"]) == 1 and record["problems"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["m.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_so_and_leaves_nothing(tmp_path, number):
    script = Path(__file__).resolve().parents[2] / "scripts" / "common" / "measure_nodes.py"
    argv = [
        sys.executable,
        str(script),
        "--device",
        "cpu",
        "--num_processes",
        "1",
        "--output",
        str(tmp_path / "m.json"),
    ]
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: list(tmp_path.rglob("invitation.json")), "the launch")
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    # a rank whose Python is just starting may tell of it at length; the last word is ours
    assert running.returncode == 130 and said.rstrip().endswith("interrupted"), said
    assert list(tmp_path.iterdir()) == []
