"""What a plan is asked for: a model, GPUs, and what of the layout is fixed already.

settings.parse(PlanSettings, argv, ..., recipe_dir=...) reads the recipes of pretrain.sh too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import settings
from train.errors import UserError
from train.planner import calibration
from train.planner.gpus import GPUS
from train.planner.model import Shape
from train.planner.speed import Cluster
from train.recipe import CheckpointSettings, DataSettings, ModelSettings, PretrainRecipe, TrainingSettings
from train.settings import Count, section, setting

_NO_PATH = "-"  # for what a recipe must name and a plan does not read
_VOCABULARY = 32_000


@dataclass(frozen=True)
class PlanSettings:
    """What is to be trained, and on what."""

    num_gpus: int = setting(help="GPUs of the run, over all nodes")
    gpu: str = setting("h200", help="kind of GPU", choices=tuple(GPUS))
    gpu_memory_gib: float | None = setting(None, help="memory of one GPU in GiB; the kind's own when not given")
    memory_headroom: float = setting(calibration.HEADROOM, help="part of the memory that is to stay free")
    gpus_per_node: int = setting(8, help="GPUs of one node; tensor ranks stay in it")
    network_gb_s: float | None = setting(
        None, help="network from one GPU to another node in GB/s, one direction; that of the maker's systems when not"
        " given",
    )  # fmt: skip
    model: ModelSettings = section(ModelSettings)
    train_tokens: Count | None = setting(None, help="tokens to train on, such as 300B: tells the days")
    global_batch_size: int | None = setting(None, help="sequences per optimizer step; the model size's when not given")
    precision: str = setting("bf16", help="number format of the computation", choices=("bf16", "fp16", "fp32"))
    vocab_size: int | None = setting(None, help="tokens of the vocabulary; the tokenizer's, or 32000, when not given")
    input_tokenizer_file: Path | None = setting(None, help="SentencePiece model that tells the vocabulary's size")
    tensor_parallel_size: int | None = setting(None, help="only layouts with so many tensor ranks")
    pipeline_parallel_size: int | None = setting(None, help="only layouts with so many pipeline stages")
    zero_stage: int | None = setting(None, help="only layouts with this ZeRO stage: 0 or 1")
    micro_batch_size: int | None = setting(None, help="only layouts with this micro batch")
    sequence_parallel: bool | None = setting(None, help="only layouts with sequence parallelism, or (False) without")
    activation_checkpoint: bool | None = setting(None, help="only layouts with recomputation, or (False) without")
    show: int = setting(10, help="layouts to show")

    @classmethod
    def from_recipe(cls, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """What a plan needs of a recipe of pretrain.sh; its layout is not taken over, as that is what is looked for.

        Raises:
            UserError: it is no such recipe.
        """
        data: Any = given.get("data") or {}
        filled = {
            **given,
            "data": {"input_tokenizer_file": _NO_PATH, "data_path": [_NO_PATH], **data}
            if isinstance(data, Mapping) else data,
            "checkpoint": _with(given.get("checkpoint"), "output_model_dir", _NO_PATH),
            "training": _with(given.get("training"), "train_tokens", 2**62),
        }  # fmt: skip
        try:
            recipe = settings.build(PretrainRecipe, filled)
        except UserError as error:
            raise UserError(f"{where}: {problem}" for problem in error.problems) from None
        training = given.get("training") or {}
        found: dict[str, Any] = {name: training[name] for name in ("train_tokens", "global_batch_size", "precision")
                                 if name in training}  # fmt: skip
        if recipe.data.input_tokenizer_file.is_file():  # a recipe may come from another machine
            found["input_tokenizer_file"] = recipe.data.input_tokenizer_file
        return {"model": dict(given.get("model") or {}), **found}

    def problems(self) -> Iterator[str]:
        for name in ("num_gpus", "gpus_per_node", "show", "tensor_parallel_size", "pipeline_parallel_size",
                     "micro_batch_size", "global_batch_size", "train_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: it must be at least 1."
        for name in ("gpu_memory_gib", "network_gb_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"--{name} {value:g}: it must be above 0."
        if not 0 <= self.memory_headroom < 1:
            yield f"--memory_headroom {self.memory_headroom:g}: a part of the memory was expected, such as 0.04."
        if self.vocab_size is not None and self.vocab_size < 2:
            yield f"--vocab_size {self.vocab_size}: it must be at least 2."
        if self.zero_stage not in (None, 0, 1):
            yield (
                f"--zero_stage {self.zero_stage}: plans are for Megatron-DeepSpeed's pipeline module, which has ZeRO 0"
                " and 1."
            )
        if self.zero_stage == 0 and self.precision == "bf16":
            yield "--zero_stage 0 --precision bf16: Megatron-DeepSpeed trains bf16 with ZeRO-1; leave --zero_stage out."
        tensor, pipeline = self.tensor_parallel_size or 1, self.pipeline_parallel_size or 1
        if tensor > self.gpus_per_node >= 1:
            yield f"--tensor_parallel_size {tensor}: tensor ranks stay in a node, which has {self.gpus_per_node} GPUs."
        if self.num_gpus >= 1 and tensor >= 1 and pipeline >= 1 and self.num_gpus % (tensor * pipeline):
            yield (
                f"--num_gpus {self.num_gpus} = {tensor} tensor x {pipeline} pipeline x"
                f" {self.num_gpus / (tensor * pipeline):g} data parallel: data parallel must be whole."
            )
        if self.num_gpus > self.gpus_per_node >= 1 and self.num_gpus % self.gpus_per_node:
            yield (
                f"--num_gpus {self.num_gpus} / --gpus_per_node {self.gpus_per_node} ="
                f" {self.num_gpus / self.gpus_per_node:g}: whole nodes were expected; change one of them."
            )
        yield from self._recipe_problems()

    def _recipe_problems(self) -> Iterator[str]:
        if any(True for _ in self.model.problems()):
            return  # they are told, and the shape cannot be looked at
        try:
            recipe = self.recipe()
        except UserError as error:
            yield from error.problems
            return
        batch, micro_batch = recipe.training.global_batch_size or 1, self.micro_batch_size
        if micro_batch is not None and batch >= 1 and micro_batch > batch:
            yield f"--micro_batch_size {micro_batch} is larger than --global_batch_size {batch}: choose a smaller one."
        if self.input_tokenizer_file is not None and not self.input_tokenizer_file.is_file():
            yield f"--input_tokenizer_file {self.input_tokenizer_file} is missing: name a .model file, or --vocab_size."

    def recipe(self) -> PretrainRecipe:
        """The run as far as it is known, resolved.

        Raises:
            UserError: neither a size nor the numbers were given, or they do not fit each other.
        """
        named = self.model.model_size is not None
        training = TrainingSettings(
            train_tokens=self.train_tokens or 2**62,
            global_batch_size=self.global_batch_size,
            lr=None if named else 1e-4,  # a plan's figures do not depend on it
            precision=self.precision,
        )
        data = DataSettings(input_tokenizer_file=Path(_NO_PATH), data_path=(_NO_PATH,))
        checkpoint = CheckpointSettings(output_model_dir=Path(_NO_PATH))
        recipe = PretrainRecipe(data=data, training=training, checkpoint=checkpoint, model=self.model).resolved()
        return dataclasses.replace(recipe, data=data, checkpoint=checkpoint)

    def shape(self, recipe: PretrainRecipe) -> Shape:
        """The model's shape.

        Raises:
            UserError: the tokenizer's file is no SentencePiece model.
        """
        size = self.vocab_size
        if size is None and self.input_tokenizer_file is not None:
            from train.checkpoint.megatron import vocabulary

            size = vocabulary.engine_vocab_size(self.input_tokenizer_file)
        return Shape.of(recipe.model, vocab_size=size or _VOCABULARY)

    @property
    def vocabulary_is_assumed(self) -> bool:
        return self.vocab_size is None and self.input_tokenizer_file is None

    @property
    def memory_gib(self) -> float:
        """Memory of one GPU."""
        return self.gpu_memory_gib if self.gpu_memory_gib is not None else GPUS[self.gpu].memory_gib

    @property
    def cluster(self) -> Cluster:
        gpu = GPUS[self.gpu]
        return Cluster(gpu, self.gpus_per_node, self.network_gb_s or gpu.network_gb_s)


def _with(given: Any, name: str, value: Any) -> Any:
    return {name: value, **(given or {})} if given is None or isinstance(given, Mapping) else given
