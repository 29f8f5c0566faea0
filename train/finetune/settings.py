"""The settings of step 4, named as in the seeds' llm-jp-sft. Flags win over the recipe.

scripts/step4_finetune_model/finetune.sh --recipe openassistant_zero3 --model_name_or_path DIR --output_dir OUT
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.cluster.settings import ClusterSettings, SubmitSettings
from train.finetune import data_settings, methods, seed_recipes
from train.finetune.record_formats import AUTO, FORMATS
from train.settings import LARGEST_SEED, section, setting

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_total_limit",
)
_NOT_NEGATIVE = (
    "num_processes",
    "weight_decay",
    "max_grad_norm",
    "save_steps",
    "eval_steps",
    "show_examples",
    "seed",
    "profile_step",
)


@dataclass(frozen=True)
class FinetuneSettings:
    """What is finetuned, on which conversations, and how."""

    model_name_or_path: str = setting(help="model folder, or name on the Hub")
    output_dir: Path = setting(help="folder to make: model, tokenizer, manifest, verification")
    data_files: tuple[str, ...] = setting(
        (),
        help="conversations: .json, .jsonl (also .gz, .zst) or .parquet files or globs, or OWNER/NAME[:SPLIT] of the "
        "Hub; without any, the seeds' openassistant_best_replies_train.jsonl from the Hub",
    )
    data_weights: tuple[float, ...] = setting(
        (), help="how much each entry of data_files counts, such as 2 1; by its examples when not given"
    )
    data_format: str = setting(
        AUTO, help="form of the records; auto goes by the keys of each", choices=(AUTO, *FORMATS)
    )
    eval_data_files: tuple[str, ...] = setting((), help="held-out conversations, evaluated but not trained on")
    eval_size: float = setting(
        0.0, help="held out of data_files when there are no eval_data_files: a number of examples, or a share below 1"
    )
    tokenizer_name_or_path: str | None = setting(None, help="tokenizer folder or name; the model's own when not given")
    use_fast: bool = setting(True, help="fast tokenizer; with False it is used all the same, and said")
    additional_special_tokens: tuple[str, ...] = setting((), help="tokens to add to tokenizer and embeddings")
    max_seq_length: int = setting(2048, help="longest example, in tokens")
    use_flash_attention_2: bool = setting(False, help="flash-attn instead of torch's own attention; needs a GPU")

    instruction_template: str = setting("### Human:", help="stands before each question; \\n is a line end")
    response_template: str = setting("### Assistant:", help="stands before each answer; \\n is a line end")
    prompt_template: str | None = setting(
        None,
        help="how a record becomes a prompt: alpaca, alpaca_ja, dolly_ja, plain or squad, a text with fields such as "
        "{instruction} {input} {output}, or a file with one; it becomes the chat template",
    )
    prompt_template_without_input: str | None = setting(
        None, help="the text for records without input, where it is worded differently"
    )
    on_error: str = setting("stop", help="what a broken or unusable record does", choices=("stop", "skip"))
    too_long: str = setting(
        "truncate", help="what happens to examples over max_seq_length", choices=("truncate", "drop")
    )
    packing: bool = setting(False, help="put several examples into one sequence")
    sample_prompts: tuple[str, ...] = setting((), help="what the model is asked at each checkpoint, for the report")
    show_examples: int = setting(3, help="examples shown before training, with what is trained in them")

    num_train_epochs: float = setting(3.0, help="passes over the data")
    max_steps: int = setting(-1, help="optimizer steps; -1 leaves it to num_train_epochs")
    per_device_train_batch_size: int = setting(8, help="examples per process and micro batch")
    per_device_eval_batch_size: int = setting(8, help="examples per process in evaluation")
    gradient_accumulation_steps: int = setting(1, help="micro batches per optimizer step")
    learning_rate: float = setting(5e-5, help="peak learning rate")
    warmup_ratio: float = setting(0.0, help="part of the steps in which the learning rate rises")
    lr_scheduler_type: str = setting(
        "linear",
        help="how the learning rate falls",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
    )
    weight_decay: float = setting(0.0, help="AdamW weight decay")
    max_grad_norm: float = setting(1.0, help="gradient clipping; 0 switches it off")
    seed: int = setting(42, help="order of the examples, and dropout")
    bf16: bool = setting(False, help="bfloat16 mixed precision")
    fp16: bool = setting(False, help="float16 mixed precision; needs a GPU")
    gradient_checkpointing: bool = setting(False, help="recompute activations to save memory")

    num_processes: int = setting(0, help="processes on each node; 0 is one per GPU, or one without GPUs")
    device: str = setting("auto", help="where to train", choices=("auto", "cuda", "cpu"))
    zero_stage: int = setting(0, help="DeepSpeed ZeRO stage; 0 trains without DeepSpeed", choices=("0", "2", "3"))
    deepspeed: Path | None = setting(None, help="DeepSpeed JSON to use as it is, instead of zero_stage")

    logging_steps: int = setting(10, help="optimizer steps between progress lines")
    profile_step: int = setting(
        0, help="optimizer step of which every rank records where its time goes, for show_profile.sh; 0 records none"
    )
    save_steps: int = setting(500, help="optimizer steps between checkpoints; 0 saves none")
    save_total_limit: int = setting(2, help="checkpoints kept until the run is over")
    eval_steps: int = setting(0, help="optimizer steps between evaluations; 0 evaluates after each epoch")
    use_wandb: bool = setting(False, help="log to Weights & Biases; offline when there is no login")
    wandb_entity: str | None = setting(None, help="W&B user or team")
    wandb_project: str | None = setting(None, help="W&B project")
    wandb_group: str | None = setting(None, help="W&B group; finetune_MODEL_HOST_TIME when not given")
    wandb_tag: str | None = setting(None, help="W&B tag")

    method: str | None = setting(
        None, help="which weights are trained; what the other flags imply when not given", choices=methods.NAMES
    )
    trainables: tuple[str, ...] = setting(
        (), help="modules to train, and no others: names, parts of names such as layers.1, or patterns ('layers.*.mlp')"
    )
    use_peft: bool | None = setting(None, help="LoRA, as --method lora")
    peft_target_model: str | None = setting(
        None, help="LoRA: modules by a list of llm-jp-sft", choices=("llm-jp", "gpt2", "llama", "mistral")
    )
    peft_target_modules: tuple[str, ...] = setting(
        (), help="LoRA: names of the modules to adapt; all linear ones but the output head when not given"
    )
    peft_lora_r: int | None = setting(None, help="LoRA: rank; 8 when not given")
    peft_lora_alpha: int | None = setting(None, help="LoRA: alpha; 32 when not given")
    peft_lora_dropout: float | None = setting(None, help="LoRA: dropout before the adapter; 0.05 when not given")
    load_in_8bit: bool = setting(False, help="LoRA on a base packed in 8 bits by bitsandbytes, which must be there")
    load_in_4bit: bool = setting(False, help="LoRA on a base packed in 4 bits (QLoRA) by bitsandbytes")
    merge: bool = setting(False, help="LoRA: also write OUTPUT_DIR/merged, the model with the adapter in its weights")
    device_map: str | None = setting(
        None,
        help="auto spreads the layers over the GPUs of this node, for one process without DeepSpeed",
        choices=("auto",),
    )
    offload: str = setting(
        "none",
        help="what ZeRO keeps in the CPU's memory: the optimizer's state, or with ZeRO-3 the weights too",
        choices=("none", "optimizer", "all"),
    )
    keep_best: bool = setting(False, help="hand over the checkpoint with the least held-out loss, not the last one")
    early_stopping_patience: int = setting(
        0, help="evaluations without a lower held-out loss that end the run; 0 never does. Hands over the best one"
    )
    trainer_arguments: tuple[str, ...] = setting(
        (), help="more for TRL's SFTConfig: NAME=VALUE, such as neftune_noise_alpha=5 optim=adafactor"
    )

    cluster: ClusterSettings = section(ClusterSettings)
    job: SubmitSettings = section(SubmitSettings)

    resume: str = setting(
        "auto",
        help="auto goes on with an unfinished run; never starts again",
        choices=("auto", "never"),
        flag_only=True,
    )
    overwrite: bool = setting(False, help="replace an existing output_dir", flag_only=True)
    dry_run: bool = setting(False, help="print what would run", flag_only=True)

    def problems(self) -> Iterator[str]:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: it must be at least 1."
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: it must not be negative."
        if self.max_seq_length < 2:
            yield f"--max_seq_length {self.max_seq_length}: it must be at least 2."
        if self.learning_rate <= 0:
            yield f"--learning_rate {self.learning_rate}: it must be above 0."
        if not 0 <= self.warmup_ratio < 1:
            yield f"--warmup_ratio {self.warmup_ratio}: it must be at least 0 and below 1."
        if self.max_steps < 1 and self.max_steps != -1:
            yield f"--max_steps {self.max_steps}: it must be at least 1, or -1 to train for num_train_epochs."
        if self.num_train_epochs <= 0:
            yield f"--num_train_epochs {self.num_train_epochs}: it must be above 0."
        if self.bf16 and self.fp16:
            yield "--bf16 and --fp16 exclude each other: choose one."
        if self.fp16 and self.device == "cpu":
            yield "--fp16 needs a GPU: use --bf16, or neither, on a CPU."
        if self.deepspeed is not None and self.zero_stage:
            yield "--deepspeed and --zero_stage exclude each other: the file states its own stage."
        if self.eval_steps and not self.evaluates:
            yield f"--eval_steps {self.eval_steps} has no effect without --eval_data_files or --eval_size: add one."
        if self.seed > LARGEST_SEED:
            yield f"--seed {self.seed}: it must be at most {LARGEST_SEED}."
        if 0 < self.max_steps < self.profile_step:
            yield f"--profile_step {self.profile_step}: the run ends after --max_steps {self.max_steps}."
        if "" in self.additional_special_tokens:
            yield "--additional_special_tokens: a token is empty; name the tokens, or leave the flag out."
        yield from methods.problems(self)
        yield from data_settings.problems(self)
        yield from self._folder_problems()
        yield from self._template_problems()
        if not self.use_wandb:
            for name in ("wandb_entity", "wandb_project", "wandb_group", "wandb_tag"):
                if getattr(self, name):
                    yield f"--{name} has no effect without --use_wandb: add it."

    def _folder_problems(self) -> Iterator[str]:
        output = self.output_dir.resolve()
        if not output.name:
            yield f"--output_dir {self.output_dir} is no folder that can be made: name one, such as out/model."
        for flag in ("model_name_or_path", "tokenizer_name_or_path"):
            given = getattr(self, flag)
            if not given or not Path(given).is_dir():
                continue
            source = Path(given).resolve()
            if source == output or source in output.parents or output in source.parents:
                yield (
                    f"--output_dir {self.output_dir} and --{flag} {given} are one folder, or one lies inside the "
                    "other: choose another output."
                )

    def _template_problems(self) -> Iterator[str]:
        for name in ("instruction_template", "response_template"):
            if not getattr(self, name).strip():
                yield f"--{name} is blank: name the text that stands before each turn, such as '### Human:'."
        if self.instruction_template.strip() == self.response_template.strip():
            yield "--instruction_template and --response_template are the same: questions and answers must differ."

    @classmethod
    def from_recipe(cls, given: dict[str, Any], *, where: str) -> dict[str, Any]:
        """A recipe as it was read, in our settings: those of the seeds have sections."""
        if not seed_recipes.is_sectioned(given):
            return given
        names = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("flag_only")]
        flat, notes = seed_recipes.translate(given, fields=names, where=where)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return flat

    @property
    def evaluates(self) -> bool:
        """Whether there is held-out data."""
        return bool(self.eval_data_files or self.eval_size)

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is handed over; stopping early would else hand over one that got worse."""
        return self.keep_best or self.early_stopping_patience > 0

    @property
    def wandb(self) -> bool:
        """What `train.monitor.wandb_run` asks for; the seeds' flag is called --use_wandb."""
        return self.use_wandb

    def with_line_ends(self) -> FinetuneSettings:
        """The same settings with a literal backslash-n in the templates turned into a line end, as shells pass it.

        The prompt template is its text, whatever named it.
        """
        return dataclasses.replace(
            data_settings.resolved(self),
            instruction_template=self.instruction_template.replace("\\n", "\n"),
            response_template=self.response_template.replace("\\n", "\n"),
        )
