"""The patches: each is needed (without it the real engine fails), each can be switched off, and what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from train.engine.megatron_deepspeed import patches
from train.engine.megatron_deepspeed.patches import (
    batch_broadcast,
    cpu_kernels,
    golden_logits,
    last_outputs,
    progress_lines,
    stand_in,
    universal_notes,
    whole_checkpoints,
)
from train.engine.megatron_deepspeed.saving import Saving
from train.errors import EXIT_NON_FINITE_LOSS, NonFiniteLossError, UserError

# What a rank does without one patch, and the error that names the reason for it.
NEEDED = {
    "deepspeed-compression": ("import megatron.training", "No module named 'deepspeed.compression.compress'"),
    "torchvision": ("import megatron.training", "No module named 'torchvision'"),
    "cpu-layer-norm": (
        "from megatron.model import LayerNorm; LayerNorm(8, eps=1e-5, sequence_parallel=False)",
        "unexpected keyword argument 'sequence_parallel'",
    ),
    "contiguous-attention": (
        "import types, torch; from megatron.model.transformer import CoreAttention;"
        " q = torch.zeros(2, 4, 6, 8).transpose(1, 2);"
        " CoreAttention.forward(types.SimpleNamespace(), q, q, q, None)",
        "view size is not compatible",
    ),
    "dataset-helpers": (
        "from megatron.data import dataset_utils; import os; os.environ['PATH'] = '/nowhere';"
        " dataset_utils.compile_helper()",
        "No such file or directory: 'make'",
    ),
}


def test_every_patch_says_what_it_is_for() -> None:
    found = patches.all_patches()
    assert len({patch.name for patch in found}) == len(found)
    assert all(patch.reason and patch.affected for patch in found)


def test_patches_are_switched_off_by_name() -> None:
    names = patches.disabled_names({patches.DISABLED_VARIABLE: "torchvision, golden-logits"})
    assert names == {"torchvision", "golden-logits"} and patches.disabled_names({}) == frozenset()
    fast = patches.disabled_names({patches.DISABLED_VARIABLE: "speed,torchvision"})
    assert {"torchvision", "compiled-layers", "early-reduction", "batch-broadcast"} <= fast
    assert not fast & {"speed", "apex", "sequence-parallel", "golden-logits"}
    with pytest.raises(UserError, match="no patch is called speed"):
        patches.forced_names({patches.FORCED_VARIABLE: "speed"})
    everything = frozenset(patch.name for patch in patches.all_patches())
    outcomes = patches.apply_all(patches.Run(), everything)
    assert {outcome.state for outcome in outcomes} == {"switched off"}


def test_unknown_patch_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no patch is called torchvison; did you mean torchvision\? There are apex, "):
        patches.disabled_names({patches.DISABLED_VARIABLE: "torchvison"})


def test_versions_whose_notes_cannot_be_taken_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def universal_checkpoint_info(self) -> object:
            return self._get_tp_replicated_param_patterns()  # type: ignore[attr-defined]

    class New:
        universal_checkpoint_info = Old.universal_checkpoint_info

        def _get_tp_replicated_param_patterns(self) -> list[str]:
            return ["a pattern"]

    for model, taken in ((Old, {}), (New, ["a pattern"])):
        monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
        monkeypatch.setitem(sys.modules, "megatron.model", types.ModuleType("megatron.model"))
        sys.modules["megatron.model"].GPTModel = model  # type: ignore[attr-defined]
        assert bool(universal_notes.PATCH.apply(patches.Run())) == (model is Old)
        assert model().universal_checkpoint_info() == taken


def test_stand_in_refuses_to_be_called() -> None:
    stand_in.put("not_there_at_all", ("run",), reason="install it")
    try:
        import not_there_at_all

        assert stand_in.is_importable("not_there_at_all")
        with pytest.raises(RuntimeError, match=r"not_there_at_all\.run is a stand-in: install it"):
            not_there_at_all.run(1)
    finally:
        del sys.modules["not_there_at_all"]
    assert not stand_in.is_importable("not_there_at_all.inside") and stand_in.is_importable("json")


def test_golden_input_is_always_the_same_and_has_no_end_of_document() -> None:
    import torch

    first, again = (golden_logits.input_ids(7, 3, 2, 200) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 200)
    assert set(first.unique().tolist()) == {0, 1, 2, 4, 5, 6}


def test_loss_is_found_in_what_upstream_logs() -> None:
    import torch

    assert progress_lines.loss_of({"lm loss": torch.tensor([2.5])}) == 2.5
    assert progress_lines.loss_of({"loss": 1}) == 1.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss_ends_the_run(tmp_path: Path, loss: float) -> None:
    (tmp_path / ".global_step6.unfinished-save").mkdir()
    with pytest.raises(NonFiniteLossError, match="at or before step 7; there is no checkpoint yet") as error:
        progress_lines.refuse_non_finite(loss, 7, tmp_path, Saving())
    assert error.value.exit_code == EXIT_NON_FINITE_LOSS
    (tmp_path / "latest").write_text("global_step3")  # it may be behind, or name a folder that is gone
    (tmp_path / "global_step5").mkdir()
    with pytest.raises(NonFiniteLossError, match=f"the last good checkpoint is {tmp_path}/global_step5"):
        progress_lines.refuse_non_finite(loss, 7, tmp_path, Saving())
    progress_lines.refuse_non_finite(3.0, 7, tmp_path, Saving())


def test_the_last_stage_gives_its_logits_back_after_it_has_walked_back_from_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    walked: list[int] = []
    backward = PipelineEngine._exec_backward_pass
    key = next(key for key, method in PipelineEngine._INSTRUCTION_MAP.items() if method is backward)
    monkeypatch.setattr(PipelineEngine, "_exec_backward_pass", lambda self, buffer_id: walked.append(buffer_id))
    monkeypatch.setattr(PipelineEngine, "_INSTRUCTION_MAP", {key: PipelineEngine._exec_backward_pass})
    assert last_outputs.PATCH.apply(patches.Run())
    for is_last, kept in ((True, ["first", None]), (False, ["first", "second"])):
        stage = types.SimpleNamespace(
            pipe_buffers={"outputs": ["first", "second"]}, is_last_stage=lambda is_last=is_last: is_last
        )
        PipelineEngine._INSTRUCTION_MAP[key](stage, 1)  # as DeepSpeed's schedule calls it
        assert stage.pipe_buffers["outputs"] == kept
    assert walked == [1, 1]


def test_micro_batches_are_sent_without_their_sizes_and_must_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[str] = []

    def upstream(keys: list[str], data: dict[str, Any], datatype: Any) -> dict[str, Any]:
        asked.extend(keys)
        return {key: data[key].to(datatype) for key in keys}

    module = types.ModuleType("megatron.core")
    module.mpu = types.SimpleNamespace(  # type: ignore[attr-defined]
        get_sequence_parallel_world_size=lambda: 1, get_tensor_model_parallel_rank=lambda: 0,
        get_tensor_model_parallel_world_size=lambda: 1,
    )  # fmt: skip
    module.tensor_parallel = types.SimpleNamespace(broadcast_data=upstream)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", module)
    assert batch_broadcast.PATCH.apply(patches.Run())
    send = module.tensor_parallel.broadcast_data
    batches = [torch.full((2, 5), value) for value in (3, 4)]
    for batch in batches:
        assert torch.equal(send(["text"], {"text": batch}, torch.int64)["text"], batch)
    assert asked == ["text"]  # of the first one alone
    for other in (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"the first one was torch.int64 \[2, 5\]: TRAIN_DISABLED_PATCHES="):
            send(["text"], {"text": other}, torch.int64)
    send(["text", "mask"], {"text": batches[0], "mask": batches[1]}, torch.int64)
    assert asked == ["text", "text", "mask"]


def in_a_rank(code: str, engine_path: str, *, disabled: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` after the patches, in a process of its own as a rank is."""
    program = (
        "import os; from train.engine.megatron_deepspeed import patches;"
        f" patches.apply_all(patches.Run(), patches.disabled_names(os.environ)); {code}"
    )
    environment = {**os.environ, "PYTHONPATH": engine_path, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, patches.DISABLED_VARIABLE: disabled},
        capture_output=True,
        text=True,
        check=False,
    )


def told_in_a_rank(code: str, engine_path: str, *, disabled: str = "") -> Any:
    """What `code` prints last, as JSON."""
    done = in_a_rank(code, engine_path, disabled=disabled)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.megatron
@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_the_engine_fails_without_it(name: str, engine_path: str) -> None:
    code, error = NEEDED[name]
    if name == "torchvision" and stand_in.is_importable("torchvision"):
        pytest.skip("torchvision is installed here, so nothing is stood in for")
    # the kernels for CPUs come between attention and the trouble it has by itself
    without = in_a_rank(code, engine_path, disabled=f"{name},cpu-kernels")
    assert without.returncode != 0 and error in without.stderr, without.stderr[-2000:]


@pytest.mark.megatron
@pytest.mark.slow
def test_the_engine_gets_as_far_as_its_own_state_with_all_of_them(engine_path: str) -> None:
    codes = [code for name, (code, _) in NEEDED.items() if name not in ("contiguous-attention",)]
    done = in_a_rank("; ".join(codes), engine_path, disabled="")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.megatron
@pytest.mark.slow
def test_what_is_not_called_is_not_imported(engine_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    monkeypatch.setenv("TOKENIZER", str(tmp_path))
    code = (
        "import json, sys; from megatron import training; from megatron.tokenizer import tokenizer;"
        " spared = [name for name in ('transformers', 'wandb', 'torchvision') if name not in sys.modules];"
        " found = type(tokenizer.AutoTokenizer.from_pretrained(os.environ['TOKENIZER'])).__name__;"
        " kept = training.wandb.define_metric; import transformers, wandb;"
        " is_whole = hasattr(transformers, 'AutoModel') and kept is wandb.define_metric;"
        " print(json.dumps([spared, found, is_whole]))"
    )
    spared, found, is_whole = told_in_a_rank(code, engine_path)
    assert spared == ["transformers", "wandb", "torchvision"] and "Tokenizer" in found and is_whole
    assert told_in_a_rank(code, engine_path, disabled="spare-imports")[0] == ["torchvision"]


@pytest.mark.megatron
@pytest.mark.slow
def test_layer_norm_is_torchs_and_marks_its_weights(engine_path: str) -> None:
    code = (
        "import json, torch; from megatron.model import LayerNorm; torch.manual_seed(0);"
        " norm = LayerNorm(8, eps=1e-3, sequence_parallel=True); x = torch.randn(3, 8);"
        " same = torch.equal(norm(x), torch.nn.functional.layer_norm(x, (8,), norm.weight, norm.bias, 1e-3));"
        " print(json.dumps([same, norm.weight.sequence_parallel, norm.bias.sequence_parallel]))"
    )
    assert told_in_a_rank(code, engine_path) == [True, True, True]


def test_cpu_kernels_compute_upstreams_formulas() -> None:
    import math

    import torch

    torch.manual_seed(3)
    x, bias, residual = torch.randn(5, 2, 8), torch.randn(8), torch.randn(5, 2, 8)
    y = x + bias
    gelu = y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
    torch.testing.assert_close(cpu_kernels.bias_gelu(x, bias), gelu)
    assert torch.equal(cpu_kernels.bias_dropout_add(x, bias, residual, 0.0), residual + y)
    assert torch.equal(cpu_kernels.bias_dropout_add(x, None, residual, 0.0), residual + x)
    dropped = cpu_kernels.bias_dropout_add(x, bias, residual, 0.5) - residual
    assert bool(((dropped == 0) | torch.isclose(dropped, 2 * y)).all()) and bool((dropped.abs() < 1e-6).any())

    query, key, value = (torch.randn(5, 2, 3, 4) for _ in range(3))  # sequence, batch, heads, head_dim
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(4)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -10000.0)
    expected = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).reshape(5, 2, 12)
    torch.testing.assert_close(cpu_kernels.causal_attention(query, key, value), expected)


def test_what_was_saved_is_told_with_its_speed(tmp_path: Path) -> None:
    step = tmp_path / "global_step8"
    (step / "folder").mkdir(parents=True)
    for name, size in (("weights.pt", 1_500_000_000), ("state.pt", 500_000_000)):
        (step / name).touch()
        os.truncate(step / name, size)  # a hole, which takes no disk
    told = "saved global_step8: 2.00 GB in 4.0 s (0.50 GB/s), checksums included"
    assert whole_checkpoints.saved_text(step, 4.0) == told
    assert whole_checkpoints.saved_text(step, 4.0, 0.7) == f"{told}; training stood still for 0.7 s"
    for_want = f"{told}; training stood still for 0.7 s, as there was too little memory for copies of 3 files"
    assert whole_checkpoints.saved_text(step, 4.0, 0.7, 3) == for_want
