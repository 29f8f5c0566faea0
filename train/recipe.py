"""What a pretraining run is: frozen dataclasses, read from YAML and flags, all problems reported at once.

    recipe = settings.parse(PretrainRecipe, argv, ..., recipe_dir=...).resolved()

Every number is stated here once; Megatron flags, the DeepSpeed JSON, the job script and the model card are rendered
from it. None means "from the model size" or "as the engine has it"; `resolved()` fills those in.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cluster.settings import ClusterSettings, SubmitSettings
from train.errors import refuse
from train.model_sizes import MODEL_SIZES
from train.settings import Count, is_number, section, setting


@dataclass(frozen=True)
class ModelSettings:
    """The model's shape."""

    model_size: str | None = setting(None, help="named shape; sets whatever is not given", choices=tuple(MODEL_SIZES))
    architecture: str | None = setting(None, help="model family", choices=("gpt2", "llama", "mistral"))
    num_layers: int | None = setting(None, help="transformer layers")
    hidden_size: int | None = setting(None, help="width of the residual stream")
    num_attention_heads: int | None = setting(None, help="query heads per layer")
    num_key_value_heads: int | None = setting(None, help="key and value heads per layer; fewer than queries is GQA")
    ffn_hidden_size: int | None = setting(None, help="width of the feed-forward layer; 4 x hidden_size when not given")
    sequence_length: int = setting(2048, help="tokens per training sequence, and the model's largest position")
    init_method_std: float | None = setting(None, help="standard deviation of the initial weights")
    tie_word_embeddings: bool | None = setting(None, help="share input and output embeddings; GPT does, Llama does not")
    rope_theta: float = setting(10000.0, help="base of the rotary position embedding (llama, mistral)")
    norm_epsilon: float = setting(1e-5, help="epsilon of the layer norms")
    dropout: float = setting(0.0, help="dropout of hidden states and attention")

    def problems(self) -> Iterator[str]:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "ffn_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: it must be at least 1."
        if self.sequence_length < 2:
            yield f"--sequence_length {self.sequence_length}: it must be at least 2."
        for name in ("init_method_std", "norm_epsilon", "rope_theta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"--{name} {value}: it must be above 0."
        if not 0 <= self.dropout < 1:
            yield f"--dropout {self.dropout}: it must be at least 0 and below 1."


@dataclass(frozen=True)
class DataSettings:
    """What is read."""

    input_tokenizer_file: Path = setting(help="SentencePiece model that tokenized the data")
    data_path: tuple[str, ...] = setting(
        help="folders, prefixes or .bin files of preprocessed data, each optionally after its weight"
    )
    split: str = setting("949,50,1", help="documents for training, validation and test, in proportion")
    num_workers: int = setting(0, help="data loading processes per rank; 0 loads in the training process")

    def problems(self) -> Iterator[str]:
        try:
            parts = [float(part) for part in self.split.split(",")]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 3 or not all(0 <= part < math.inf for part in parts) or parts[0] == 0:
            yield f"--split {self.split!r}: three proportions such as 949,50,1 were expected, the first above 0."
        if self.num_workers < 0:
            yield f"--num_workers {self.num_workers}: it must be 0 or more."


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast, how precise."""

    train_tokens: Count = setting(help="tokens to train on, such as 300B or 3e9")
    global_batch_size: int | None = setting(None, help="sequences per optimizer step, over all ranks")
    micro_batch_size: int = setting(
        1, help="sequences per rank and forward pass; 0 takes one that the plan says is as fast as any that fits"
    )
    lr: float | None = setting(None, help="peak learning rate")
    min_lr: float | None = setting(None, help="learning rate at the end of the decay")
    lr_warmup_tokens: Count = setting(0, help="tokens of linear warm-up")
    lr_decay_tokens: Count | None = setting(None, help="tokens until min_lr is reached; train_tokens when not given")
    lr_decay_style: str = setting("cosine", help="shape of the decay", choices=("cosine", "linear", "constant"))
    weight_decay: float = setting(0.1, help="decoupled weight decay of the matrices")
    adam_beta1: float = setting(0.9, help="Adam's first momentum")
    adam_beta2: float = setting(0.95, help="Adam's second momentum")
    adam_epsilon: float = setting(1e-8, help="Adam's epsilon")
    clip_grad: float = setting(1.0, help="largest global gradient norm; 0 switches clipping off")
    precision: str = setting("bf16", help="number format of the computation", choices=("bf16", "fp16", "fp32"))
    float8: bool = setting(
        False, help="matrix products of the layers in float8, the rest in bf16; GPUs since Ada and Hopper, with the"
        " package torchao (Megatron-DeepSpeed)",
    )  # fmt: skip
    seed: int = setting(1234, help="seed of initial weights and data order")

    def problems(self) -> Iterator[str]:
        if self.micro_batch_size < 0:
            yield f"--micro_batch_size {self.micro_batch_size}: it must be 0 (automatic) or more."
        for name in ("train_tokens", "global_batch_size", "lr_decay_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: it must be at least 1."
        for name in ("min_lr", "lr_warmup_tokens", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            if value is not None and value < 0:
                yield f"--{name} {value}: it must be 0 or more."
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 0 and below 1."
        if self.adam_epsilon <= 0:
            yield f"--adam_epsilon {self.adam_epsilon}: it must be above 0."
        if not 0 <= self.seed < 2**32:
            yield f"--seed {self.seed}: it must be at least 0 and below 2^32."
        if self.lr is not None and self.lr <= 0:
            yield f"--lr {self.lr}: it must be above 0."
        if self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            yield f"--min_lr {self.min_lr} is above --lr {self.lr}: the learning rate decays from lr to min_lr."
        decay_tokens = self.lr_decay_tokens or self.train_tokens
        if self.lr_warmup_tokens >= decay_tokens:
            yield (
                f"--lr_warmup_tokens {self.lr_warmup_tokens:,} must be below the {decay_tokens:,} tokens of the decay:"
                " shorten the warm-up or train longer."
            )


@dataclass(frozen=True)
class ParallelSettings:
    """How the model and its state are spread over ranks."""

    engine: str = setting(
        "auto", help="what trains; auto takes Megatron-DeepSpeed when it is installed and can train this recipe",
        choices=("auto", "megatron-deepspeed", "transformers"),
    )  # fmt: skip
    megatron_arguments: str = setting(
        "", help="further arguments of Megatron-DeepSpeed's pretrain_gpt.py in one text, such as"
        " '--rampup-batch-size 32 32 1000000'; a single word is given as --megatron_arguments=--WORD",
    )  # fmt: skip
    num_processes: int = setting(0, help="processes on each node; 0 is one per GPU, or one without GPUs")
    data_parallel_size: int = setting(
        0, help="ranks that share the batch: refuse to start unless there are so many; 0 takes what the ranks give"
    )
    tensor_parallel_size: int = setting(1, help="ranks that share one layer (Megatron-DeepSpeed)")
    pipeline_parallel_size: int = setting(1, help="ranks that share the stack of layers (Megatron-DeepSpeed)")
    layers_per_stage: tuple[int, ...] = setting(
        (), help="layers of each pipeline stage; balanced with the logits' cost when not given (Megatron-DeepSpeed)"
    )
    no_pipeline_parallel: bool = setting(False, help="use the engine without its pipeline module (Megatron-DeepSpeed)")
    sequence_parallel: bool | None = setting(
        None, help="split norms and dropout over the tensor ranks (Megatron-DeepSpeed); in bf16 on GPUs when not given"
    )
    zero_stage: int = setting(0, help="ZeRO: 1 spreads optimizer state, 2 gradients too, 3 weights too")
    offload: str = setting("none", help="what waits in CPU memory", choices=("none", "optimizer", "all"))
    activation_checkpoint: bool | None = setting(
        None, help="recompute activations: less memory, about a third slower; when not given, where that is the fastest"
        " that fits by the plan",
    )  # fmt: skip
    attention: str = setting(
        "sdpa", help="attention kernel", choices=("sdpa", "flash_attention_2", "eager")
    )  # fmt: skip
    torch_compile: bool | None = setting(
        None, help="compile the model with torch.compile (transformers engine); on GPUs, up to ZeRO-2, when not given"
    )
    device: str = setting("auto", help="where to train", choices=("auto", "cuda", "cpu"))

    def problems(self) -> Iterator[str]:
        if self.zero_stage not in (0, 1, 2, 3):
            yield f"--zero_stage {self.zero_stage} is not one of 0, 1, 2, 3."
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        for name in ("num_processes", "data_parallel_size"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must be 0 (automatic) or more."
        try:
            shlex.split(self.megatron_arguments)
        except ValueError as error:
            yield f"--megatron_arguments {self.megatron_arguments!r}: {error}; quote it as in a shell."
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "all" else 1):
            needed = "3" if self.offload == "all" else "1, 2 or 3"
            yield f"--offload {self.offload} needs --zero_stage {needed}, not {self.zero_stage}."


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept, and when it is measured."""

    output_model_dir: Path = setting(help="folder for checkpoints, logs and TensorBoard files")
    job_name: str | None = setting(None, help="name of this run's folders; made from the recipe when not given")
    initial_checkpoint_dir: Path | None = setting(
        None, help="begin with the weights of this checkpoint of Megatron-DeepSpeed, such as one that"
        " convert_huggingface_model_to_megatron_deepspeed.sh made, instead of random ones",
    )  # fmt: skip
    save_interval: int = setting(1000, help="optimizer steps between checkpoints; the last step is always saved")
    keep_last: int = setting(0, help="checkpoints to keep; 0 keeps all")
    async_save: bool = setting(
        True, help="write checkpoints while the next steps are trained, from copies in the machine's memory where"
        " there is enough of it (Megatron-DeepSpeed)",
    )  # fmt: skip
    eval_interval: int = setting(1000, help="optimizer steps between evaluations; 0 evaluates never")
    eval_iters: int = setting(100, help="batches per evaluation")

    def problems(self) -> Iterator[str]:
        name = self.job_name
        if name is not None and (name in ("", ".", "..") or not re.fullmatch(r"[^/\0]{1,150}", name)):
            yield f"--job_name {name!r}: a plain name of at most 150 characters was expected, without a slash."
        if self.save_interval < 1:
            yield f"--save_interval {self.save_interval}: it must be at least 1."
        for name in ("keep_last", "eval_interval", "eval_iters"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must be 0 or more."


@dataclass(frozen=True)
class LoggingSettings:
    """Who is told."""

    log_interval: int = setting(10, help="optimizer steps between progress lines")
    profile_step: int = setting(
        0, help="optimizer step of which every rank records where its time goes, for show_profile.sh; 0 records none"
    )
    log_optimizer_state: bool = setting(False, help="log norms of the optimizer state (Megatron-DeepSpeed)")
    use_wandb: bool = setting(False, help="log to Weights & Biases; offline when there is no login")
    wandb_entity: str | None = setting(None, help="W&B user or team; switches W&B on")
    wandb_project: str | None = setting(None, help="W&B project; switches W&B on")
    wandb_group: str | None = setting(None, help="W&B group; pretrain_MODEL_HOST_TIME when not given")
    wandb_tag: str | None = setting(None, help="W&B tag")

    def problems(self) -> Iterator[str]:
        if self.log_interval < 1:
            yield f"--log_interval {self.log_interval}: it must be at least 1."
        if self.profile_step < 0:
            yield f"--profile_step {self.profile_step}: it must be 0 (none) or a step's number."
        if self.wandb_group and len(self.wandb_group) > 128:
            yield f"--wandb_group has {len(self.wandb_group)} characters, W&B takes 128: choose a shorter name."

    @property
    def wandb(self) -> bool:
        """Whether W&B is wanted."""
        return self.use_wandb or bool(self.wandb_entity or self.wandb_project)


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretraining run."""

    data: DataSettings
    training: TrainingSettings
    checkpoint: CheckpointSettings
    model: ModelSettings = section(ModelSettings)
    parallel: ParallelSettings = section(ParallelSettings)
    logging: LoggingSettings = section(LoggingSettings)
    cluster: ClusterSettings = section(ClusterSettings)
    job: SubmitSettings = section(SubmitSettings)
    dry_run: bool = setting(False, help="print what would run, and run nothing", flag_only=True)
    rehearse: bool = setting(
        False, help="run this layout with a tiny model on CPU processes: train, save, resume, export, verify",
        flag_only=True,
    )  # fmt: skip
    overwrite: bool = setting(False, help="start again from step 0, replacing this job's checkpoints", flag_only=True)

    def resolved(self) -> PretrainRecipe:
        """The recipe with every open value filled in from the model size, the job's name made and paths absolute.

        So the saved recipe gives the same run from any folder.

        Raises:
            UserError: neither a size nor the numbers were given, or they do not fit each other.
        """
        model, training = self.model, self.training
        size = MODEL_SIZES[model.model_size] if model.model_size else None
        shape: dict[str, Any] = {
            name: getattr(model, name) if getattr(model, name) is not None else getattr(size, name, None)
            for name in ("architecture", "num_layers", "hidden_size", "num_attention_heads", "init_method_std")
        }
        shape["architecture"] = shape["architecture"] or "gpt2"
        shape["init_method_std"] = shape["init_method_std"] or 0.02
        schedule: dict[str, Any] = {
            name: getattr(training, name) if getattr(training, name) is not None else getattr(size, name, None)
            for name in ("global_batch_size", "lr", "min_lr")
        }
        missing = [name for name, value in {**shape, **schedule}.items() if value is None and name != "min_lr"]
        refuse(f"--{name} is required, or --model_size one of {', '.join(MODEL_SIZES)}." for name in missing)
        own_shape = model.hidden_size is not None or model.num_attention_heads is not None
        model = dataclasses.replace(
            model,
            **shape,
            num_key_value_heads=model.num_key_value_heads
            or (size.num_key_value_heads if size and not own_shape else shape["num_attention_heads"]),
            ffn_hidden_size=model.ffn_hidden_size
            or (size.ffn_hidden_size if size and model.hidden_size is None else 4 * shape["hidden_size"]),
            tie_word_embeddings=shape["architecture"] == "gpt2"
            if model.tie_word_embeddings is None
            else model.tie_word_embeddings,
        )
        training = dataclasses.replace(
            training,
            global_batch_size=schedule["global_batch_size"],
            lr=schedule["lr"],
            min_lr=schedule["min_lr"] if schedule["min_lr"] is not None else schedule["lr"] / 10,
            lr_decay_tokens=training.lr_decay_tokens or training.train_tokens,
        )
        recipe = dataclasses.replace(self, model=model, training=training)
        refuse([*training.problems(), *recipe._shape_problems(), *recipe._step_problems()])
        data = dataclasses.replace(
            self.data,
            input_tokenizer_file=self.data.input_tokenizer_file.absolute(),
            data_path=tuple(word if is_number(word) else str(Path(word).absolute()) for word in self.data.data_path),
        )
        checkpoint = dataclasses.replace(
            self.checkpoint,
            job_name=self.checkpoint.job_name or recipe.made_up_job_name(),
            output_model_dir=self.checkpoint.output_model_dir.absolute(),
            initial_checkpoint_dir=self.checkpoint.initial_checkpoint_dir
            and self.checkpoint.initial_checkpoint_dir.absolute(),
        )
        return dataclasses.replace(recipe, data=data, checkpoint=checkpoint)

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the run: the first number of steps that covers `train_tokens`."""
        tokens_per_step = self.tokens_per_step
        return -(-self.training.train_tokens // tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        assert self.training.global_batch_size is not None, "resolved() comes first"
        return self.training.global_batch_size * self.model.sequence_length

    @property
    def model_name(self) -> str:
        """The model's name in folders, groups and cards, such as gpt_0.125B or llama_4x256."""
        if self.model.model_size:
            return self.model.model_size
        family = "gpt" if self.model.architecture == "gpt2" else self.model.architecture
        return f"{family}_{self.model.num_layers}x{self.model.hidden_size}"

    def made_up_job_name(self) -> str:
        """A folder name that tells runs apart, after the seeds': model, tokens, learning rate, batch, layout, seed."""
        training, parallel = self.training, self.parallel
        return (
            f"{self.model_name}_tok{_short(training.train_tokens)}_lr{training.lr:g}_min{training.min_lr:g}"
            f"_w{_short(training.lr_warmup_tokens)}_{training.lr_decay_style}_gbs{training.global_batch_size}"
            f"_mbs{training.micro_batch_size or 'auto'}_z{parallel.zero_stage}_tp{parallel.tensor_parallel_size}"
            f"_pp{parallel.pipeline_parallel_size}_seed{training.seed}"
        )

    def _step_problems(self) -> Iterator[str]:
        if self.logging.profile_step > self.train_steps:
            yield (
                f"--profile_step {self.logging.profile_step}: the run ends after step {self.train_steps:,}; name one of"
                " its steps."
            )

    def _shape_problems(self) -> Iterator[str]:
        model = self.model
        assert model.hidden_size and model.num_attention_heads and model.num_key_value_heads
        if model.hidden_size % model.num_attention_heads:
            yield (
                f"--hidden_size {model.hidden_size} / --num_attention_heads {model.num_attention_heads} ="
                f" {model.hidden_size / model.num_attention_heads:g}: the heads must share the width evenly."
            )
        if model.num_attention_heads % model.num_key_value_heads:
            yield (
                f"--num_attention_heads {model.num_attention_heads} / --num_key_value_heads"
                f" {model.num_key_value_heads}: each key-value head must serve the same number of query heads."
            )
        if model.architecture == "gpt2" and model.num_key_value_heads != model.num_attention_heads:
            yield "--num_key_value_heads: GPT-2 has one per query head; choose --architecture llama or mistral for GQA."
        if model.architecture == "gpt2" and not model.tie_word_embeddings:
            yield "--tie_word_embeddings False: a GPT-2 folder ties them; choose --architecture llama or mistral."


def _short(tokens: int) -> str:
    for suffix, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= factor:
            return f"{tokens / factor:.4g}{suffix}"
    return str(tokens)
