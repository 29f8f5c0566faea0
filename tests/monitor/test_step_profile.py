"""One step's time: summed up by kinds of work, shown rank beside rank, recorded in a real process."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.monitor import profile_table, step_profile
from train.monitor.profile_table import ProfileSettings
from train.monitor.time_shares import KINDS, Event, kind_of, read_events, time_shares


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::add_", "other kernels"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int)", "communication"),
        ("gloo:all_reduce", "communication"),
        ("triton_poi_fused_add_gelu_0", "compiled regions"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_0", "compiled regions"),
        ("_ReduceFromModelParallelRegion", "communication"),
        ("Memcpy PtoP (Device -> Device)", "copies"),
        ("aten::fill_", "copies"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_kernel", "other kernels"),
    ],
)
def test_names_tell_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind and kind in KINDS


def test_every_instant_counts_once() -> None:
    """Milliseconds:  gemm 0-4, nccl 3-7, a copy beside it 5-6, nothing until 9, a kernel 9-10."""
    events = [
        Event("nccl", 3000, 7000), Event("gemm", 0, 4000), Event("Memcpy DtoD", 5000, 6000), Event("x", 9000, 10000),
    ]  # fmt: skip
    found = time_shares(events, seconds=0.012)
    kinds = {name: round(seconds * 1000, 6) for name, seconds in found["kinds"].items() if seconds}
    assert kinds == {"matrix products": 4, "communication": 2, "copies": 1, "other kernels": 1, "nothing": 4}
    assert sum(found["kinds"].values()) == pytest.approx(0.012)
    assert found["hidden_communication"] == pytest.approx(0.002)  # 3-4 beside the product, 5-6 beside the copy
    assert [(kernel["name"], kernel["calls"]) for kernel in found["longest"]][:2] == [("gemm", 1), ("nccl", 1)]
    assert found["gaps"] == [{"after": "nccl", "before": "x", "calls": 1, "seconds": pytest.approx(0.002)}]


def trace(file: Path, events: list[dict[str, Any]]) -> Path:
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": [{"ph": "X", "dur": 1, **event} for event in events]}, stream)
    return file


def test_a_trace_is_its_kernels(tmp_path: Path) -> None:
    file = trace(tmp_path / "t.json.gz", [
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "tid": 1},
        {"cat": "kernel", "name": "gemm", "ts": 10.5, "dur": 2, "tid": 7},
        {"cat": "gpu_memset", "name": "Memset", "ts": 13, "tid": 7},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 9, "tid": 1},
    ])  # fmt: skip
    assert read_events(file) == [Event("gemm", 10.5, 12.5), Event("Memset", 13, 14)]


def test_without_a_gpu_operators_count_without_what_they_call(tmp_path: Path) -> None:
    """outer 0-10 calls inner 2-5 and inner 6-7; another thread runs beside it."""
    file = trace(tmp_path / "t.json.gz", [
        {"cat": "cpu_op", "name": "outer", "ts": 0, "dur": 10, "tid": 1},
        {"cat": "cpu_op", "name": "inner", "ts": 2, "dur": 3, "tid": 1},
        {"cat": "cpu_op", "name": "inner", "ts": 6, "dur": 1, "tid": 1},
        {"cat": "cpu_op", "name": "beside", "ts": 1, "dur": 4, "tid": 2},
    ])  # fmt: skip
    own: dict[str, float] = {}
    for event in read_events(file):
        own[event.name] = own.get(event.name, 0) + event.end_us - event.start_us
    assert own == {"outer": 6, "inner": 4, "beside": 4}


def test_a_step_is_recorded_once_and_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    profile = step_profile.StepProfile(tmp_path / "profile", step=4, rank=0)
    took_time = []
    values = torch.randn(64, 64)
    for step in range(8):  # 0: where the run stands
        took_time.append(profile.after(step))
        for _ in range(step + 1):
            values = (values @ values).tanh()
    assert took_time == [False, False, True, True, True, False, False, False]
    record = json.loads((tmp_path / "profile" / "step4_rank0.json").read_text())
    (products,) = [kernel for kernel in record["longest"] if kernel["name"] == "aten::mm"]
    assert products["calls"] == 4 and record["step"] == 4  # after step 3 four ran before step 4 was over
    assert sum(record["kinds"].values()) == pytest.approx(record["seconds"], rel=0.05)
    assert "step 4 was recorded" in capsys.readouterr().out


def test_a_run_that_goes_on_just_before_the_step_records_it(tmp_path: Path) -> None:
    profile = step_profile.StepProfile(tmp_path, step=4, rank=1)
    assert profile.after(3) and profile.after(4) and not profile.after(5)
    assert (tmp_path / "step4_rank1.json").is_file() and (tmp_path / "step4_rank1.trace.json.gz").is_file()


def test_a_run_that_goes_on_after_it_records_nothing(tmp_path: Path) -> None:
    profile = step_profile.StepProfile(tmp_path, step=4, rank=0)
    assert not any(profile.after(step) for step in range(4, 8)) and not list(tmp_path.iterdir())


def test_a_recording_that_fails_is_told_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    profile = step_profile.StepProfile(tmp_path / "profile", step=3, rank=1)
    assert [profile.after(step) for step in range(6)] == [False, True, True, True, False, False]
    told = capsys.readouterr().out
    assert told.startswith("rank 1: step 3 is not recorded: ") and "profile" in told and told.count("\n") == 1


def test_what_more_ranks_left_of_the_same_step_goes(tmp_path: Path) -> None:
    for name in ("step3_rank5.json", "step3_rank5.trace.json.gz", "step30_rank5.json", "step2_rank0.json"):
        (tmp_path / name).touch()
    profile = step_profile.StepProfile(tmp_path, step=3, rank=0)
    for step in range(4):
        profile.after(step)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["step2_rank0.json", "step30_rank5.json", "step3_rank0.json", "step3_rank0.trace.json.gz"]


@pytest.mark.parametrize(
    ("first", "last", "told"), [(0, 11, False), (11, 20, False), (0, 12, False), (12, 20, True), (0, 10, True)]
)
def test_a_step_that_does_not_come_is_told(
    first: int, last: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = 12 if first else 11
    step_profile.StepProfile(tmp_path, step=step, rank=0).expect(first=first, last=last)
    step_profile.StepProfile(tmp_path, step=step, rank=1).expect(first=first, last=last)  # one rank is enough
    out = capsys.readouterr().out
    assert ("nothing is recorded" in out) is told and out.count("\n") == int(told)


def test_no_step_no_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert step_profile.of_this_rank(tmp_path, 0) is None
    profile = step_profile.of_this_rank(tmp_path, 2)
    assert profile is not None and profile.after(1) and profile.after(2)
    assert (tmp_path / "step2_rank3.json").is_file()


def record(folder: Path, step: int, rank: int, *, communication: float = 0.25) -> None:
    kinds = dict.fromkeys(KINDS, 0.0) | {"matrix products": 1.0, "communication": communication}
    named = [{"name": "a | long\nname" + "x" * 200, "kind": "copies", "calls": 1234, "seconds": 0.5}]
    gaps = [{"after": "gemm", "before": "nccl", "calls": 3, "seconds": 0.1}]
    text = {"step": step, "seconds": 2.0, "kinds": kinds, "hidden_communication": 0.1, "longest": named, "gaps": gaps}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step{step}_rank{rank}.json").write_text(json.dumps(text))


def test_ranks_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        record(tmp_path / "profile" / "job", 12, rank)
        record(tmp_path / "profile" / "job", 9, rank)
    assert profile_table.show(ProfileSettings(tmp_path, rank=1)) == 0
    told = capsys.readouterr().out
    assert "step 12 in" in told and "| milliseconds | rank 0 | rank 1 |" in told
    assert "| matrix products | 1,000.0 (50%) | 1,000.0 (50%) |" in told
    assert "| the step | 2,000.0 | 2,000.0 |" in told and "longest on rank 1" in told
    assert "| `a / long name" in told and "| copies | 1,234 | 500.0 | 25.0% |" in told
    assert "| `gemm` | `nccl` | 3 | 100.0 | 5.0% |" in told and "step12_rank1.trace.json.gz" in told
    assert profile_table.show(ProfileSettings(tmp_path, step=9)) == 0


def test_of_many_ranks_those_at_the_ends_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(20):
        record(tmp_path / "profile", 2, rank, communication=0.01 * ((rank * 7) % 20))
    profile_table.show(ProfileSettings(tmp_path))
    told = capsys.readouterr().out
    # of 7 x rank modulo 20: 0, 3 and 6 wait least, 8, 11, 14 and 17 most
    assert "7 of 20 ranks" in told and "| rank 0 | rank 3 | rank 6 | rank 8 | rank 11 | rank 14 | rank 17 |" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"step": 3}, "--step 3: .* has step 2"),
        ({"rank": 7}, "--rank 7: .* has step 2 of rank 0"),
        ({"job_name": "c"}, "--job_name c: .* has a, b"),
        ({"job_name": None}, "--job_name is needed: .* has a, b"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    for job in ("a", "b"):
        record(tmp_path / "profile" / job, 2, 0)
    with pytest.raises(UserError, match=message):
        profile_table.show(ProfileSettings(**{"folder": tmp_path, "job_name": "a", **more}))


def test_a_folder_without_recordings_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--profile_step"):
        profile_table.show(ProfileSettings(tmp_path))
    record(tmp_path / "profile", 2, 0)
    file = tmp_path / "profile" / "step2_rank0.json"
    whole = json.loads(file.read_text())
    damaged = [
        "{",
        "[]",
        json.dumps({**whole, "seconds": 0}),
        *(json.dumps({**whole, key: "x"}) for key in ("kinds", "seconds", "gaps")),
    ]
    del whole["hidden_communication"]
    for text in (*damaged, json.dumps(whole)):
        file.write_text(text)
        with pytest.raises(UserError, match=r"step2_rank0\.json is damaged"):
            profile_table.show(ProfileSettings(tmp_path))
    file.unlink()
    (tmp_path / "profile" / "job").mkdir()
    with pytest.raises(UserError, match="nothing was recorded there"):
        profile_table.show(ProfileSettings(tmp_path))
