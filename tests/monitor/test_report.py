"""The report of a run: its numbers are read back from the HTML, of every kind of run, whatever its names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_line_chart import read_back  # type: ignore[import-not-found]

from train import cli, manifest, settings
from train.evaluate import record as evaluation
from train.finetune.folder import FinetuneFolder, checkpoint_mark
from train.finetune.settings import FinetuneSettings
from train.monitor import samples
from train.monitor.report import ReportSettings, report
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder

WEIRD = "<b>&\"run\" '1' {{ 7*7 }} 日本"


class Tables(HTMLParser):
    """Tables as rows of cells, by class; text by class of pre and div; and a check that tags close in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.tags: set[str] = set()
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = dict(attrs).get("class") or ""
        if tag not in self.VOID:
            self._open.append((tag, named))
        if tag == "table":
            self.tables.setdefault(named, [])
        elif tag == "tr":
            self.tables[self._table()].append([])
        elif tag in ("td", "th"):
            self.tables[self._table()][-1].append("")
        elif tag in ("pre", "div") and named:
            self.texts.setdefault(named, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, named = self._open[-1] if self._open else ("", "")
        if tag in ("td", "th"):
            self.tables[self._table()][-1][-1] += data
        elif tag in ("pre", "div") and named:
            self.texts[named][-1] += data

    def _table(self) -> str:
        return next(named for tag, named in reversed(self._open) if tag == "table")


def call(*argv: object) -> int:
    return cli.run(ReportSettings, report, [str(word) for word in argv], description="", example="")


def pretraining(root: Path, name: str = "gpt") -> RunFolder:
    plain = {
        "data": {"input_tokenizer_file": "t.model", "data_path": ["d"]},
        "training": {"train_tokens": 204800, "global_batch_size": 8, "lr": 1e-3},
        "checkpoint": {"output_model_dir": str(root), "job_name": "gpt"},
        "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "sequence_length": 256},
    }
    run = RunFolder(root, name)
    for file in (run.recipe, run.metrics):
        file.parent.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(settings.to_yaml(settings.build(PretrainRecipe, plain).resolved()))
    lines: list[dict[str, Any]] = []
    for step in range(10, 60, 10):
        numbers = {"loss": 9 - step / 10, "lr": step * 1e-5, "tokens_per_second": 1000.0 + step, "grad_norm": 1.5}
        lines.append({"step": step, "tokens": step * 2048, **numbers, "gpu_memory_gib": 3.25})
    lines.insert(2, {"step": 20, "tokens": 40960, "eval_loss": 7.75, "eval_perplexity": 2321.57})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    return run


def checkpoint(run: RunFolder, step: int, size: int) -> None:
    folder = run.step_dir(step)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"x" * size)


def finetuning(output: Path) -> FinetuneFolder:
    run = FinetuneFolder(output)
    for step in (20, 30):
        (run.checkpoint_dir / f"checkpoint-{step}").mkdir(parents=True)
        (run.checkpoint_dir / f"checkpoint-{step}" / "trainer_state.json").write_text('{"max_steps": 80}')
    checkpoint_mark(run.checkpoint_dir / "checkpoint-20").touch()
    plain = settings.build(FinetuneSettings, {"model_name_or_path": "m", "output_dir": str(output)})
    run.recipe.write_text(settings.to_yaml(plain))
    run.metrics.write_text('{"step": 20, "tokens": 2000, "loss": 1.5, "lr": 0.1, "token_accuracy": 0.5}\n')
    return run


def test_a_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretraining(tmp_path / "out")
    assert call("--folder", tmp_path / "out", "--output", tmp_path / "report.html") == 0
    assert "report.html: gpt" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Tables(text)
    charts = {
        title: read_back(svg) for title, svg in re.findall(r"<h3>([^<]+)</h3>\s*(<svg.*?</svg>)", text, re.DOTALL)
    }
    assert list(charts) == ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "GPU memory (GiB)"]
    (losses,) = charts["Loss"]["training"]
    assert losses == [
        (pytest.approx(step, abs=0.1), pytest.approx(9 - step / 10, abs=0.03)) for step in range(10, 60, 10)
    ]
    (held_out,) = charts["Loss"]["held out"]
    assert held_out == [(pytest.approx(20, abs=0.1), pytest.approx(7.75, abs=0.03))]
    assert charts["GPU memory (GiB)"]["most taken so far"][0][0][1] == pytest.approx(3.25, abs=0.01)
    head, *rows = page.tables["numbers"]
    assert head == [
        "step", "tokens", "loss", "held-out loss", "held-out perplexity", "learning rate", "gradient norm",
        "tokens per second", "GPU memory (GiB)",
    ]  # fmt: skip
    assert rows[0] == ["10", "20,480", "8", "", "", "0.0001", "1.5", "1010", "3.25"]
    assert rows[2][3:5] == ["7.75", "2321.57"]
    assert len(rows) == 6
    assert page.texts["settings"] == [run.recipe.read_text()]
    assert (
        "gpt: ended (pretraining)" in page.texts["state"][0]
        and "loss: 4.0000, held out 7.7500" in page.texts["state"][0]
    )


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    pretraining(tmp_path)
    assert call("--folder", tmp_path, "--output", tmp_path / "r.html") == 0
    text = (tmp_path / "r.html").read_text()
    assert not {"script", "link", "img", "iframe", "object"} & Tables(text).tags
    assert not re.search(r"https?:|\b(src|href)\s*=|url\(|@import", text)
    assert "default-src 'none'" in text


def test_whatever_the_names_the_page_is_whole(tmp_path: Path) -> None:
    run = pretraining(tmp_path / WEIRD, WEIRD.replace("/", ""))
    run.recipe.write_text("# </pre><script>alert(1)</script>\n")
    file = run.metrics.with_suffix(".samples.jsonl")
    samples.append(file, step=10, prompt="</div><img src=x>", answer="<script>&amp; {{ 7*7 }} 日本\n二行")
    assert call("--folder", tmp_path / WEIRD) == 0
    text = (tmp_path / WEIRD / "report.html").read_text(encoding="utf-8")
    page = Tables(text)
    assert not {"b", "script", "img"} & page.tags
    assert page.texts["settings"] == ["# </pre><script>alert(1)</script>\n"]
    assert page.texts["said"] == ["<script>&amp; {{ 7*7 }} 日本\n二行"]
    assert page.texts["state"][0].startswith(f"{WEIRD}: ")


def test_several_runs_of_a_folder_and_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        pretraining(tmp_path, name)
    assert call("--folder", tmp_path) == 0
    assert (tmp_path / "report.html").read_text().count("<section") == 2
    assert call("--folder", tmp_path, "--job_name", "b") == 0
    assert '<section data-run="b">' in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").read_text().count("<section") == 1
    assert call("--folder", tmp_path, "--job_name", "c") == 2
    assert "has a, b" in capsys.readouterr().err


def test_checkpoints_of_a_pretraining(tmp_path: Path) -> None:
    run = pretraining(tmp_path)
    for step in (10, 9):
        checkpoint(run, step, 2**20)
    assert call("--folder", run.checkpoint_dir, "--output", tmp_path / "r.html") == 0
    rows = Tables((tmp_path / "r.html").read_text()).tables["checkpoints"]
    assert rows[1:] == [["global_step9", "9", "0.001"], ["global_step10", "10", "0.001"]]


def test_an_unfinished_finetuning(tmp_path: Path) -> None:
    run = finetuning(tmp_path / "chat")
    samples.append(run.root / samples.FILE_NAME, step=20, prompt="q", answer="a")
    assert call("--folder", tmp_path / "chat") == 0
    page = Tables((tmp_path / "chat.report.html").read_text())
    assert page.tables["checkpoints"][1:] == [["checkpoint-20", "20", "0.000"]]  # not the one that is half written
    assert page.tables["numbers"][1] == ["20", "2,000", "1.5", "0.1", "0.5"]
    assert page.texts["said"] == ["a"]
    assert not (tmp_path / "chat").exists()


def test_a_finished_finetuning_with_its_results_and_evaluation(tmp_path: Path) -> None:
    output = tmp_path / "chat"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "metrics.jsonl").write_text(
        '{"step": 5, "tokens": 10, "loss": NaN}\n{"step": 6, "tokens": 12, "loss": 2.5}\n'
    )
    (output / "recipe.yaml").write_text("lr: 1\n")
    results = {
        "steps": 6,
        "last_loss": 2.5,
        "loss_curve": [[6, 2.5]],
        "weights_sha256": "x",
        "data": {"examples": 1234},
    }
    manifest.write(
        output / "manifest.json", step="finetune_model", settings={}, inputs=[], results=results, started=0.0
    )
    measured = {
        "exact match: qa": {"measure": "exact match", "model": {"exact_match": 75.0}, "base": {"exact_match": 5.0}}
    }
    evaluation.write(output, output, measured, settings={}, inputs=[], started=0.0)
    assert call("--folder", output) == 0
    text = (output / "report.html").read_text()
    page = Tables(text)
    assert page.tables["results"] == [["steps", "6"], ["last loss", "2.5"], ["data: examples", "1,234"]]
    assert page.tables["evaluation"][1:] == [["exact match: qa", "exact match (%)", "5.0000", "75.0000"]]
    assert "1 of the losses are NaN or infinite" in text
    assert page.tables["software"]


def test_a_run_that_has_reported_nothing(tmp_path: Path) -> None:
    run = pretraining(tmp_path)
    run.metrics.write_text("")
    assert call("--folder", tmp_path) == 0
    assert "Nothing was reported yet." in (tmp_path / "report.html").read_text()


def test_long_runs_stay_small(tmp_path: Path) -> None:
    run = pretraining(tmp_path)
    lines = [json.dumps({"step": step, "tokens": step, "loss": 5.0 + step % 7, "lr": 1.0}) for step in range(1, 30_000)]
    run.metrics.write_text("\n".join(lines))
    assert call("--folder", tmp_path) == 0
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 200_000
    rows = Tables(text).tables["numbers"]
    assert len(rows) == 101 and (rows[1][0], rows[-1][0]) == ("1", "29,999")


def test_only_a_report_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretraining(tmp_path)
    output = tmp_path / "r.html"
    output.write_text("mine")
    assert call("--folder", tmp_path, "--output", output) == 2
    assert "r.html exists and is no report: pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert call("--folder", tmp_path, "--output", output, "--overwrite") == 0
    assert call("--folder", tmp_path, "--output", output) == 0


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--folder", tmp_path / "none", "--dry_run") == 0
    assert f"would write {tmp_path / 'none.report.html'}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--folder", tmp_path / "none") == 2
    assert "is no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_takes_the_folder_first(launch: Any, tmp_path: Path) -> None:
    pretraining(tmp_path / "a b")
    done = launch("common/report.sh", tmp_path / "a b", "--output", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").is_file()
