"""Examples of a batch do not see each other: packed or not, each is trained as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_samples import argv, call  # type: ignore[import-not-found]

from train import settings as settings_module
from train.cluster.launch import End
from train.finetune import launch, trainer_arguments, worker
from train.finetune.folder import FinetuneFolder, Plan


@pytest.fixture
def trainer(
    files: dict[str, Any], question_file: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Any:
    """A rank's trainer, as the worker makes it; packing, unless the test asks for none."""
    from transformers import AutoTokenizer

    from train.finetune.trainer import FinetuneTrainer

    monkeypatch.setattr(launch.launch, "run", lambda plan, *, log: End(1, ""))
    changes = {"packing": getattr(request, "param", True), "eval_data_files": question_file, "show_examples": 0}
    assert call(*argv(files, **changes)) == 1
    folder = FinetuneFolder(files["output_dir"])
    plan = settings_module.build(Plan, settings_module.read_yaml(folder.plan))
    arguments = trainer_arguments.build(
        plan.finetune, folder, device=plan.device, deepspeed_config=None, is_resumed=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer_dir)
    return FinetuneTrainer(
        folder=folder,
        model=worker.load_model(plan, tokenizer),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=worker._examples(folder.train_examples),
        eval_dataset=worker._examples(folder.eval_examples),
    )


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_each_example_has_the_logits_it_has_alone(trainer: Any, is_training: bool) -> None:
    import torch

    batches = trainer.get_train_dataloader() if is_training else trainer.get_eval_dataloader()
    batch = {name: value for name, value in next(iter(batches)).items() if name != "labels"}
    ids, starts = batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == (12 if is_training else 8)
    model = trainer.model.train(is_training)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        mixed = model(input_ids=ids[None], use_cache=False).logits[0]  # what they would be, seeing each other
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            alone = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
            assert torch.allclose(packed[start:end], alone, atol=1e-5)
            assert start == 0 or not torch.allclose(mixed[start:end], alone, atol=1e-3)


def test_the_loss_of_a_packed_batch_is_that_of_its_examples(trainer: Any) -> None:
    import torch

    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    found = float(trainer.compute_loss(model, dict(batch)).detach())
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    nats, tokens = 0.0, 0
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, labels[start + 1 : end], reduction="none", ignore_index=-100)
        nats, tokens = nats + float(each.sum()), tokens + int((labels[start + 1 : end] != -100).sum())
    assert found == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("trainer", [False], indirect=True, ids=["not packed"])
def test_the_loss_of_a_padded_batch_is_that_of_its_examples(trainer: Any) -> None:
    """Though the model is handed no mask: nothing that is trained comes after the padding."""
    import torch

    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    assert len(model.base_model._forward_pre_hooks) == 1
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    found = float(trainer.compute_loss(model, dict(batch)).detach())
    nats, tokens = 0.0, 0
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length], use_cache=False).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, labels[1:length], reduction="none", ignore_index=-100)
        nats, tokens = nats + float(each.sum()), tokens + int((labels[1:length] != -100).sum())
    assert found == pytest.approx(nats / tokens, rel=1e-5)
