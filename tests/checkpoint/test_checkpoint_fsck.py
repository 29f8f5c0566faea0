"""Every kind of damage to a checkpoint is found, and told with the file's name. On real checkpoints of the engine.

`summed` is of a Llama shape (TP2 x DP2, ZeRO-1, bf16) and has recorded checksums. `upstream` (GPT, TP2 x PP2, ZeRO-0)
has none, as those of upstream alone and of the seeds' fork.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from train import checkpoint_files, cli, resume
from train.checkpoint import check
from train.checkpoint.megatron import fsck, reader
from train.errors import UserError

HERE = Path(__file__).parent
LAYER = "layer_02-model_01-model_states.pt"
OPTIMIZER = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture
def summed(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "megatron_tp2_dp2_zero1_bf16" / "global_step8", tmp_path / "a" / "global_step8"))


@pytest.fixture
def unsummed(summed: Path) -> Path:
    """The same without its list: what else finds damage."""
    (summed / checkpoint_files.FILES).unlink()
    return summed


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "megatron_tp2_pp2" / "global_step8", tmp_path / "b" / "global_step8"))


def problems(folder: Path) -> tuple[str, ...]:
    return check.check_folder(folder).problems


def rewrite(file: Path, change: Callable[[Any], None]) -> None:
    """Changes what a file holds and writes it anew, so that its own checksums fit."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum]):
        state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def run(*words: str) -> int:
    return cli.run(check.CheckSettings, check.check, words, description="", example="")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_whole_checkpoints_are_whole_and_say_what_they_are_good_for(summed: Path, upstream: Path) -> None:
    with_sums, without = check.check_folder(summed), check.check_folder(upstream)
    assert with_sums.problems == without.problems == with_sums.notes == ()
    assert with_sums.description == "Megatron-DeepSpeed, TP 2 x PP 1 x DP 2, ZeRO 1"
    assert {ability.name: ability.possible for ability in with_sums.abilities} == {
        "resume": True, "reshape": True, "export": True,
    }  # fmt: skip
    assert "no checksums were recorded" in without.notes[0]
    reshape = without.abilities[1]
    assert not reshape.possible and "begin runs whose layout may change with --zero_stage 1" in reshape.reason


@pytest.mark.parametrize("seed", range(40))
def test_one_flipped_bit_is_found_every_time(summed: Path, seed: int) -> None:
    file = random.Random(seed).choice(sorted(summed.iterdir()))
    flip(file, random.Random(seed).randrange(file.stat().st_size * 8))
    found = problems(summed)
    assert any(problem.startswith((f"{file.name}: ", "files.json: ")) for problem in found) or "files.json" in file.name
    assert found


def test_without_sums_a_flipped_bit_is_found_where_it_reaches_a_state(upstream: Path) -> None:
    """The rest lies in the zip file's own padding and names, which nothing reads."""
    files, found = sorted(upstream.glob("*.pt")), 0
    for seed in range(60):
        file = files[seed % len(files)]
        before, content = file.read_bytes(), flat(reader.load(file))
        flip(file, random.Random(seed).randrange(len(before) * 8))
        if problems(upstream):
            found += 1
        else:
            assert flat(reader.load(file)) == content, f"{file.name}, seed {seed}"
        file.write_bytes(before)
    assert found > 40


def test_files_without_inner_checksums_are_whole_and_found_truncated(unsummed: Path) -> None:
    """As this project's runs write them, beside a list of better ones, which may get lost."""
    file = unsummed / OPTIMIZER
    with checkpoint_files.without_inner_checksums():
        rewrite(file, lambda state: None)
    assert torch.serialization.get_crc32_options()
    with zipfile.ZipFile(file) as archive:
        assert not any(part.CRC for part in archive.infolist())
    found = check.check_folder(unsummed)
    assert found.problems == () and "1 of 16 .pt files hold no checksums either" in found.notes[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert any("truncated or damaged" in problem for problem in problems(unsummed))


def flat(state: Any) -> Any:
    """A state's values as plain data, for comparison."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    return [flat(item) for item in state] if isinstance(state, (list, tuple)) else repr(state).partition(" object")[0]


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", LAYER, OPTIMIZER])
@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file_is_found(unsummed: Path, name: str, size: int) -> None:
    file = unsummed / name
    file.write_bytes(file.read_bytes()[:size])
    assert any(name in problem and "truncated or damaged" in problem for problem in problems(unsummed))
    assert any("truncated or damaged" in problem for problem in fsck.glance(unsummed))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", LAYER, OPTIMIZER, "golden_logits.safetensors"])
def test_a_missing_file_is_found_once(summed: Path, name: str) -> None:
    (summed / name).unlink()
    found = [problem for problem in problems(summed) if name in problem]
    assert found[0] == f"{name}: missing" and len([x for x in found if x.startswith(f"{name}: missing")]) == 1


def test_without_a_list_the_layout_tells_what_is_missing(unsummed: Path) -> None:
    for name in (LAYER, OPTIMIZER):
        (unsummed / name).unlink()
        assert f"{name}: missing, TP 2 x PP 1 x DP 2, ZeRO 1 has it" in problems(unsummed)
        assert f"{name}: missing, TP 2 x PP 1 x DP 2, ZeRO 1 has it" in list(fsck.glance(unsummed))


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_02_model_states.pt",
        "layer_06-model_00-model_states.pt",
        "layer_02-model_02-model_states.pt",
        "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
    ],
)
def test_a_rank_file_of_another_layout_is_found(summed: Path, name: str) -> None:
    shutil.copy(summed / OPTIMIZER, summed / name)
    assert problems(summed) == (f"{name}: no file of TP 2 x PP 1 x DP 2, ZeRO 1; it is of another layout",)
    assert check.check_folder(summed).notes == (f"{name}: was not there when it was saved",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(unsummed: Path, value: float) -> None:
    rewrite(unsummed / LAYER, lambda state: state["mlp.dense_h_to_4h.weight"][3].fill_(value))
    assert f"{LAYER}: mlp.dense_h_to_4h.weight has NaN or infinite values" in problems(unsummed)
    moments = lambda state: state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]  # noqa: E731
    rewrite(unsummed / OPTIMIZER, lambda state: moments(state)[0].fill_(value))
    assert f"{OPTIMIZER}: exp_avg of parameter group 0 has NaN or infinite values" in problems(unsummed)


def test_replicas_that_have_drifted_are_found(unsummed: Path) -> None:
    rewrite(unsummed / LAYER, lambda state: state["input_layernorm.weight"][0].add_(0.25))
    (drifted,) = [problem for problem in problems(unsummed) if "drifted" in problem]
    assert drifted.startswith(f"{LAYER}: input_layernorm.weight differs from layer_02-model_00-model_states.pt by 0.25")


@pytest.mark.parametrize("numbers", [("00", "01")])
def test_swapped_files_of_two_ranks_are_found(summed: Path, numbers: tuple[str, str]) -> None:
    for pattern in ("layer_02-model_{}-model_states.pt", "bf16_zero_pp_rank_0_mp_rank_{}_optim_states.pt"):
        swap(*(summed / pattern.format(number) for number in numbers))
        assert [x.partition(":")[0] for x in problems(summed)][:2] == [pattern.format(number) for number in numbers]
        assert "other contents than were written" in problems(summed)[0]
        swap(*(summed / pattern.format(number) for number in numbers))
    assert problems(summed) == ()


def test_without_a_list_swapped_files_are_found_by_what_the_optimizer_holds(unsummed: Path, upstream: Path) -> None:
    swap(unsummed / "layer_02-model_00-model_states.pt", unsummed / LAYER)
    assert any("is not what the weights were rounded from" in problem for problem in problems(unsummed))
    swap(unsummed / "layer_02-model_00-model_states.pt", unsummed / LAYER)
    swap(unsummed / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", unsummed / OPTIMIZER)
    assert any("is not what the weights were rounded from" in x or "numbers of" in x for x in problems(unsummed))
    swap(upstream / "mp_rank_01_model_states.pt", upstream / "mp_rank_02_model_states.pt")
    assert "mp_rank_01_model_states.pt: written by rank 2, rank 1 writes it; were files swapped?" in problems(upstream)


def swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    shutil.copy(second, first)
    second.write_bytes(kept)


def test_types_and_shapes_that_do_not_fit_are_found(unsummed: Path) -> None:
    def change(state: Any) -> None:
        state["self_attention.dense.weight"] = state["self_attention.dense.weight"].half()
        state["mlp.dense_4h_to_h.weight"] = state["mlp.dense_4h_to_h.weight"][:, :-1]
        del state["mlp.dense_h_to_4h.weight"]

    rewrite(unsummed / LAYER, change)
    found = problems(unsummed)
    assert f"{LAYER}: self_attention.dense.weight is float16, the run's type is bfloat16" in found
    assert f"{LAYER}: other tensors than in layer_02-model_00-model_states.pt (mlp.dense_h_to_4h.weight)" in found
    rewrite(unsummed / "layer_02-model_00-model_states.pt", change)
    found = problems(unsummed)
    first = "layer_02-model_00-model_states.pt"
    assert (
        f"{first}: mlp.dense_4h_to_h.weight is [16, 30] over all tensor ranks, the arguments make it [16, 32]" in found
    )
    assert f"{first}: mlp.dense_h_to_4h.weight is missing" in found


def test_shapes_that_differ_between_ranks_are_found(unsummed: Path) -> None:
    rewrite(unsummed / LAYER, lambda state: state.update({"mlp.dense_4h_to_h.weight": torch.zeros(16, 8)}))
    assert any(
        x.startswith(f"{LAYER}: mlp.dense_4h_to_h.weight is [16, 8] float32, in layer_02-model_00")
        for x in problems(unsummed)
    )


def test_optimizer_states_of_another_step_are_found(unsummed: Path) -> None:
    state_of = lambda state: state["optimizer_state_dict"]["base_optimizer_state"]["state"]  # noqa: E731
    rewrite(unsummed / OPTIMIZER, lambda state: state_of(state)[0]["step"].fill_(4))
    assert any("the ranks' states are of different steps [4.0, 8.0]" in problem for problem in problems(unsummed))


def test_a_folder_of_another_step_is_found(summed: Path) -> None:
    renamed = summed.rename(summed.with_name("global_step9"))
    assert problems(renamed) == ("mp_rank_00_model_states.pt: of step 8, the folder is called global_step9",)


def test_an_optimizer_that_is_not_there_is_found(upstream: Path) -> None:
    file = upstream / "mp_rank_01_model_states.pt"
    plain = (int, float, str, torch.dtype)  # upstream's own classes cannot be written without it
    said = {name: value for name, value in vars(reader.load(file)["args"]).items() if isinstance(value, plain)}
    torch.save({"args": argparse.Namespace(**said), "module": None}, file)
    assert "mp_rank_01_model_states.pt: no optimizer state" in problems(upstream)


def test_a_checkpoint_to_begin_with_holds_weights_only(
    make_checkpoint: Any, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.checkpoint.megatron.import_huggingface import ImportSettings, import_model

    source = make_checkpoint("llama")
    settings = ImportSettings(source, tmp_path / "out", tensor_parallel_size=2, input_tokenizer_file=tokenizer_file)
    assert import_model(settings) in (0, None)
    findings = check.check_folder(tmp_path / "out" / "global_step0")
    assert findings.problems == ()
    assert [ability.possible for ability in findings.abilities] == [False, False, True]
    assert "--initial_checkpoint_dir" in findings.abilities[0].reason
    assert run("--input_model_dir", str(tmp_path / "out")) == 0
    assert "the same command goes on" not in capsys.readouterr().out


def test_what_upstream_alone_has_saved_is_glanced_at_before_a_run_goes_on(upstream: Path) -> None:
    assert resume.look(upstream.parent, node="a").steps == {8: ()}
    (upstream / "mp_rank_03_model_states.pt").write_bytes(b"")
    assert "truncated or damaged" in resume.look(upstream.parent, node="a").steps[8][0]


class Runs:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return (print, ("this was run",))


def test_what_would_run_code_is_found_and_not_run(unsummed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Runs()}, unsummed / LAYER)
    (found,) = [problem for problem in problems(unsummed) if "may run code on loading" in problem]
    assert found.startswith(f"{LAYER}: names print, which no checkpoint of Megatron-DeepSpeed needs")
    (unsummed / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Runs()))
    assert problems(unsummed)
    assert "this was run" not in capsys.readouterr().out


def test_a_file_that_may_not_be_read_is_found(summed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as root where nothing is forbidden, so the system's answer is made up."""
    opened = Path.open

    def forbidden(self: Path, *words: Any, **options: Any) -> Any:
        if self.name == LAYER:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *words, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    assert problems(summed) == (f"{LAYER}: cannot be read (Permission denied)",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: {**t, "logits": t["logits"][..., :-1].contiguous()}, "for ids [1, 32] and 256 vocabulary rows"),
        (lambda t: {**t, "logits": t["logits"] * float("nan")}, "NaN or infinite logits"),
        (lambda t: {"input_ids": t["input_ids"]}, "truncated or damaged ('logits')"),
    ],
)
def test_golden_logits_that_do_not_fit_are_found(unsummed: Path, change: Any, problem: str) -> None:
    file = unsummed / "golden_logits.safetensors"
    save_file(change(load_file(file)), file)
    (found,) = problems(unsummed)
    assert found.startswith("golden_logits.safetensors: ") and problem in found


def test_without_golden_logits_an_export_is_proven_less(unsummed: Path) -> None:
    (unsummed / "golden_logits.safetensors").unlink()
    findings = check.check_folder(unsummed)
    assert findings.problems == ()
    assert findings.abilities[2].possible and "weaker check" in findings.abilities[2].reason


def test_damage_says_what_is_still_possible(summed: Path) -> None:
    (summed / OPTIMIZER).unlink()
    assert [(ability.name, ability.possible) for ability in check.check_folder(summed).abilities] == [
        ("resume", False), ("reshape", False), ("export", True),
    ]  # fmt: skip
    flip(summed / LAYER, 50_00)
    assert not any(ability.possible for ability in check.check_folder(summed).abilities)


def test_a_job_is_checked_as_a_whole(summed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = summed.parent
    shutil.copytree(summed, job / "global_step9")
    (job / ".global_step12.unfinished-save").mkdir()
    (job / "global_step7.damaged").mkdir()
    assert run("--input_model_dir", str(job)) == 3
    out, err = capsys.readouterr()
    assert f"{summed}: whole" in out and f"{job / 'global_step9'}: damaged" in out
    assert ".global_step12.unfinished-save: half-written" in out and "global_step7.damaged: damaged and set" in out
    assert "1 of 2 checkpoints damaged: global_step9" in err


def test_json_and_exit_codes(summed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input_model_dir", str(summed), "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert record["whole"] and record["reshape"] == {"possible": True, "reason": "by DeepSpeed's universal form"}
    flip(summed / LAYER, 0)
    assert run("--input_model_dir", str(summed), "--json") == 3
    (record,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert not record["whole"] and record["problems"]


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".global_step4.unfinished-save").mkdir()
    for name, message in (
        ("file", "is a file: name a checkpoint"),
        ("nowhere", "does not exist: name a checkpoint"),
        (".global_step4.unfinished-save", "is half-written"),
        (".", "is not a whole checkpoint"),
    ):
        assert run("--input_model_dir", str(tmp_path / name)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        check.check_folder(tmp_path / "file")


def test_a_model_to_be_published_is_no_damaged_checkpoint(make_checkpoint: Any) -> None:
    folder = make_checkpoint()
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", checkpoint_files.FILES):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"is a Hugging Face model and no checkpoint.* checked by .*verify_model\.py"):
        check.check_folder(folder)


def test_counts_that_are_none_are_found(tmp_path: Path) -> None:
    arguments = argparse.Namespace(num_layers=2)
    torch.save({"args": arguments, "global_steps": "many"}, tmp_path / "mp_rank_00_model_states.pt")
    assert "says that it is of step 'many', of 1 ranks: it is damaged" in problems(tmp_path)[0]


def test_checkpoints_of_the_transformers_engine(make_checkpoint: Any) -> None:
    step_dir = make_checkpoint()
    (step_dir / "optimizer.pt").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(100.0)}, step_dir / name)
    checkpoint_files.record(step_dir)
    findings = check.check_folder(step_dir)
    assert findings.problems == () and all(ability.possible for ability in findings.abilities)
    for seed in range(20):
        file = random.Random(seed).choice(sorted(step_dir.iterdir()))
        bit = random.Random(seed).randrange(file.stat().st_size * 8)
        flip(file, bit)
        assert problems(step_dir), f"{file.name}, bit {bit}"
        flip(file, bit)
    flip(
        step_dir / "optimizer.pt",
        (step_dir / "optimizer.pt").read_bytes().index(torch.arange(100.0).numpy().tobytes()) * 8,
    )
    (step_dir / checkpoint_files.FILES).unlink()
    found = problems(step_dir)
    assert any(x.startswith("optimizer.pt: its part") and x.endswith("is damaged (CRC-32)") for x in found)
    (step_dir / "scheduler.pt").unlink()
    weights = load_file(step_dir / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, step_dir / "model.safetensors", metadata={"format": "pt"})
    found = problems(step_dir)
    assert {"scheduler.pt: missing", "model.safetensors: transformer.ln_f.bias has NaN or infinite values"} <= set(
        found
    )
