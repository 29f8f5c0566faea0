"""All steps from one YAML: checked at once, run in a row, or submitted as a chain that stops at the first failure."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from train import all_steps, process, step_recipe
from train.all_steps import RECIPES, RunAllSettings, run_all
from train.errors import UserError

WHOLE = """
output_dir: out
job:
  {queue: gpu, account: g, wall_time: "12:00:00", job_nodes: 2, job_gpus_per_node: 8,
   scheduler_options: [--exclusive]}
train_tokenizer: {input: [a.jsonl], model_prefix: out/tok/t, vocab_size: 2000}
preprocess_data: {output_prefix: out/tokens/t}
pretrain_model:
  recipe: gpt_0.125B
  output_model_dir: out/pre
  job: {num_jobs: 3}
convert_model: {output_tokenizer_and_model_dir: out/hf/base}
upload_pretrained_model: {output_model_name: base}
finetune_model: {data_files: [b.jsonl], output_dir: out/hf/chat, num_train_epochs: 1, job: {job_nodes: 1}}
upload_finetuned_model: {output_model_name: chat}
"""
NAMES = [kind.name for kind in step_recipe.KINDS]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the inputs of WHOLE."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"messages": []}\n')
    return tmp_path


@pytest.fixture
def calls(folder, monkeypatch):
    """Fake sbatch, qsub and scancel; returns what was asked of them."""
    file, fakes = folder / "calls", folder / "bin"
    fakes.mkdir()
    for program, answer in {
        "sbatch": "Submitted batch job $n",
        "qsub": 'Your job $n (\\"x\\") has been submitted',
    }.items():
        (fakes / program).write_text(
            f'#!/bin/bash\necho "{program} $*" >>{file}\nn=$(( $(wc -l <{file}) + 40 ))\n'
            f'[[ $n -le ${{MOST:-99}} ]] || {{ echo "no more"; exit 1; }}\necho "{answer}"\n'
        )
    for program in ("scancel", "qdel"):
        (fakes / program).write_text(f'#!/bin/bash\necho "{program} $*" >>{file}\n')
    for fake in fakes.iterdir():
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return lambda: [re.sub(r"/\S*/(\w+)_\d{8}_\S+", r"\1", line) for line in file.read_text().splitlines()]


def write(text: str) -> str:
    Path("steps.yaml").write_text(text)
    return "steps.yaml"


def test_each_step_gets_what_the_one_before_makes(folder):
    recipe = step_recipe.read(Path(write(WHOLE)))
    assert [step.kind.name for step in recipe.steps] == NAMES
    flags = {step.kind.name: step.flags for step in recipe.steps}
    assert flags["preprocess_data"] == {
        "output_prefix": "out/tokens/t", "input_tokenizer_file": "out/tok/t.model", "input": ["a.jsonl"]}  # fmt: skip
    assert flags["pretrain_model"]["data_path"] == "out/tokens/t_text_document"
    pretrained = recipe.steps[2].settings.checkpoint
    assert flags["convert_model"]["input_model_dir"] == f"{folder}/out/pre/checkpoint/{pretrained.job_name}"
    assert flags["convert_model"]["input_model_max_length"] == 2048
    for name, flag in {
        "upload_pretrained_model": "input_tokenizer_and_model_dir",
        "finetune_model": "model_name_or_path",
    }.items():
        assert flags[name][flag] == "out/hf/base"
    assert flags["upload_finetuned_model"]["input_tokenizer_and_model_dir"] == "out/hf/chat"


def test_what_is_given_wins_and_steps_may_be_left_out(folder):
    text = "preprocess_data: {input: [a.jsonl], input_tokenizer_file: x.model, output_prefix: p, json_key: body}\n"
    text += "pretrain_model: {recipe: demo, output_model_dir: o, data_path: [0.5, q]}\n"
    recipe = step_recipe.read(Path(write(text)))
    assert [step.kind.name for step in recipe.steps] == ["preprocess_data", "pretrain_model"]
    assert recipe.steps[1].flags["data_path"] == [0.5, "q"]
    assert recipe.steps[1].flags["input_tokenizer_file"] == "x.model"
    assert recipe.output_dir == folder / "output" / "steps"


def test_only_steps_that_train_ask_for_nodes_and_gpus(folder):
    jobs = {step.kind.name: step.job for step in step_recipe.read(Path(write(WHOLE))).steps}
    assert (jobs["pretrain_model"].job_nodes, jobs["pretrain_model"].num_jobs) == (2, 3)
    assert (jobs["finetune_model"].job_nodes, jobs["finetune_model"].job_gpus_per_node) == (1, 8)
    for name in ("train_tokenizer", "preprocess_data", "convert_model", "upload_finetuned_model"):
        job = jobs[name]
        assert (job.job_nodes, job.job_gpus_per_node, job.num_jobs, job.scheduler_options) == (1, 0, 1, ())
        assert (job.queue, job.account, job.wall_time) == ("gpu", "g", "12:00:00")
    text = WHOLE + "cpu_job: {queue: cpu, job_cpus_per_node: 16}\n"
    cpu = step_recipe.read(Path(write(text))).steps[0].job
    assert (cpu.queue, cpu.account, cpu.job_cpus_per_node) == ("cpu", "g", 16)


def test_problems_of_all_steps_at_once(folder):
    text = WHOLE.replace("vocab_size: 2000", "vocab_size: 1").replace("gpt_0.125B", "gpt_0.126B")
    text = text.replace("num_train_epochs: 1", "num_epochs: 1").replace("output_model_name: chat", "overwrite: true")
    with pytest.raises(UserError) as caught:
        step_recipe.read(Path(write(text)))
    starts = [problem.split(":")[0] for problem in caught.value.problems]
    assert starts == ["train_tokenizer", "pretrain_model", "finetune_model", "upload_finetuned_model"]
    assert "--num_epochs is not a setting" in caught.value.problems[2]
    assert "overwrite belongs to one call" in caught.value.problems[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no step; there are train_tokenizer, preprocess_data"),
        ("pretrain: {}\n", "pretrain is no step"),
        ("train_tokenizer: 5\n", "train_tokenizer is a section and holds flags, not 5"),
        ("job: [1]\ntrain_tokenizer: {}\n", "job is a section"),
        ("train_tokenizer: {input: {a: 1}}\n", "train_tokenizer: --input holds a section, not a value"),
        (WHOLE.replace("num_jobs: 3", "num_job: 3"), "pretrain_model: .*num_job is not a setting"),
        (WHOLE.replace('"12:00:00"', "12h"), "train_tokenizer: --wall_time 12h: .* was expected"),
        ("[1, 2]\n", "a recipe is a mapping"),
    ],
)
def test_a_recipe_that_is_none(folder, text, message):
    with pytest.raises(UserError, match=message):
        step_recipe.read(Path(write(text)))


def test_inputs_are_looked_for_before_anything_starts(folder, calls):
    (folder / "b.jsonl").unlink()
    (folder / "a.jsonl").unlink()
    for scheduler in (None, "slurm"):
        with pytest.raises(UserError) as caught:
            run_all(RunAllSettings(write(WHOLE), submit=scheduler))
        starts = [problem.split(":")[0] for problem in caught.value.problems]
        assert starts == ["train_tokenizer", "preprocess_data", "finetune_model"]
    assert not (folder / "calls").exists() and not (folder / "out").exists()
    with pytest.raises(UserError, match=r"pretrain_model: --input_tokenizer_file \S+/no.model: there is no such file"):
        text = "pretrain_model: {recipe: demo, output_model_dir: o, data_path: d, input_tokenizer_file: no.model}"
        run_all(RunAllSettings(write(text)))


def test_here_they_run_in_a_row_and_stop_at_the_first_failure(folder, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(Path(command.argv[1]).name)
        return 3 if "convert" in command.argv[1] else 0

    monkeypatch.setattr(process, "run", run)
    with pytest.raises(UserError, match="convert_model ended with exit code 3; the same command goes on") as caught:
        run_all(RunAllSettings(write(WHOLE)))
    assert caught.value.exit_code == 3
    assert [name[:8] for name in ran] == ["train_se", "preproce", "pretrain", "convert_"]


def test_as_jobs_each_waits_for_the_success_of_the_one_before(folder, calls, capsys, project_root):
    assert run_all(RunAllSettings(write(WHOLE), submit="slurm")) == 0
    after = "sbatch --dependency=afterok:{} --kill-on-invalid-dep=yes "
    pretrain = calls()[2].split()[-1]
    assert calls() == [
        "sbatch train_tokenizer",
        after.format(41) + "preprocess_data",
        after.format(42) + pretrain,
        after.format("42,afterany:43") + pretrain,
        after.format("42,afterany:44") + pretrain,
        after.format(45) + "convert_model",
        after.format(46) + "upload_pretrained_model",
        after.format(47) + "chat",
        after.format(48) + "upload_finetuned_model",
    ]
    told = capsys.readouterr().out
    status = shlex.quote(str(project_root / "scripts" / "common" / "status.sh"))
    assert "jobs 43, 44, 45" in told and f"{status} {folder}/out/hf/chat" in told
    record = json.loads((folder / "out" / "hf" / "chat.job" / "chat.json").read_text())
    assert record["ids"] == ["48"]
    script = Path(record["script"]).read_text()
    assert "#SBATCH --gpus-per-node=8" in script and "--time_budget_min 710" in script
    script = next((folder / "out" / "job").glob("convert_model_*.sh")).read_text()
    assert "gpus" not in script and "--time_budget_min" not in script and "#SBATCH --partition=gpu" in script


def test_grid_engine_cannot_ask_for_success_so_the_scripts_do(folder, calls, capsys):
    text = WHOLE.replace("scheduler_options: [--exclusive]", "resource: rt_F")
    run_all(RunAllSettings(write(text), submit="gridengine"))
    assert calls()[1] == "qsub -hold_jid 41 preprocess_data" and calls()[3].startswith("qsub -g g -hold_jid 42,43")
    assert "looks at the exit code before" in capsys.readouterr().out
    script = next((folder / "out" / "job").glob("preprocess_data_*.sh")).read_text()
    before = next((folder / "out" / "job").glob("train_tokenizer_*.sh")).with_suffix(".exit")
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "JOB_ID": "42"}, capture_output=True, text=True)
    assert done.returncode == 1 and "did not succeed (exit code unknown)" in done.stderr
    before.write_text("41 2\n")
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "JOB_ID": "42"}, capture_output=True, text=True)
    assert done.returncode == 2 and "did not succeed (exit code 2)" in done.stderr


def test_all_steps_are_submitted_or_none(folder, calls, monkeypatch):
    monkeypatch.setenv("MOST", "44")
    with pytest.raises(UserError) as caught:
        run_all(RunAllSettings(write(WHOLE), submit="slurm"))
    assert "sbatch refused the job (exit code 1): no more" in caught.value.problems[0]
    assert calls()[-2:] == ["scancel 43 44", "scancel 41 42"]
    assert [file.name for file in (folder / "out").rglob("*") if file.is_file()] == []


def test_what_a_scheduler_cannot_be_told_is_said_of_all_steps(folder, calls):
    with pytest.raises(UserError) as caught:
        run_all(RunAllSettings(write(WHOLE), submit="gridengine"))
    starts = {problem.split(":")[0] for problem in caught.value.problems}
    assert starts == {"pretrain_model", "finetune_model"}
    assert not (folder / "calls").exists()


@pytest.mark.parametrize("scheduler", [None, "slurm", "gridengine", "pbs"])
def test_dry_run_shows_all(folder, capsys, scheduler):
    assert run_all(RunAllSettings("demo", submit=scheduler, dry_run=True)) == 0
    told = capsys.readouterr().out
    for name in ("train_sentencepiece_tokenizer.py", "preprocess_data.sh", "pretrain.sh", "finetune.sh"):
        assert name in told
    assert told.count("#!/bin/bash") == (7 if scheduler else 0)
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_the_shipped_recipe_is_found_by_name():
    assert all_steps.RECIPES == RECIPES and (RECIPES / "demo.yaml").is_file()


@pytest.mark.slow
def test_the_demos_steps_run_and_are_skipped_the_second_time(tmp_path, launch):
    """As docs/submit.md runs them, but for fewer steps."""
    sample = launch("common/make_sample_data.py", "--output_dir", "output/run_all/data", cwd=tmp_path)
    assert sample.returncode == 0, sample.stderr
    text = (RECIPES / "demo.yaml").read_text()
    for few, many in (("train_tokens: 40K", "train_tokens: 200K"), ("lr_warmup_tokens: 4K", "lr_warmup_tokens: 20K"),
                      ("max_steps: 2", "max_steps: 10")):  # fmt: skip
        assert many in text
        text = text.replace(many, few)
    (tmp_path / "small.yaml").write_text(text)
    for words in ("held-out", "nothing to do"):
        done = launch("common/run_all.sh", "--recipe", "small.yaml", cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert words in done.stdout
    assert done.stdout.count("nothing to do") >= 5
    assert (tmp_path / "output" / "run_all" / "upload" / "small_chat" / "README.md").is_file()


def test_a_batch_that_does_not_fit_the_jobs_nodes_is_refused_before_any_job_waits(calls):
    uneven = WHOLE.replace("recipe: gpt_0.125B", "recipe: gpt_0.125B\n  global_batch_size: 250\n  engine: transformers")
    with pytest.raises(UserError, match="pretrain_model: --global_batch_size 250 is not a multiple of 16 data"):
        run_all(RunAllSettings(recipe=write(uneven), submit="slurm"))
    assert not Path("calls").exists() and not Path("out").exists()


def test_a_step_that_is_asked_to_end_has_the_time_that_it_gives_its_ranks_to_save(folder, monkeypatch, capsys):
    given = []

    def run(command, *, grace_s):
        given.append(grace_s)
        return 0

    monkeypatch.setattr("train.all_steps.process.run", run)
    longer = WHOLE.replace("recipe: gpt_0.125B", "recipe: gpt_0.125B\n  grace_s: 600")
    run_all(RunAllSettings(write(longer)))
    capsys.readouterr()
    assert sorted(set(given)) == [30.0, 90.0, 630.0]
