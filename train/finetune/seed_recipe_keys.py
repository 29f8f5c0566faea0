"""The keys of the seeds' YAML recipes (`train.finetune.seed_recipes`), and what each is called here.

https://github.com/ohtaman/abci-examples/tree/main/202310/config
"""

from __future__ import annotations

HELD_OUT = 1000  # what the seeds' scripts split off when a data set has no test split
LOCAL_FORMATS = ("json", "parquet")
# A key's name here; None: it has no effect here.
MODEL: dict[str, str | None] = {
    "pretrained_model_name_or_path": "model_name_or_path",
    "device_map": "device_map",
    "load_in_8bit": "load_in_8bit",
    "load_in_4bit": "load_in_4bit",
    "use_flash_attention_2": "use_flash_attention_2",
    "trust_remote_code": None,
    "torch_dtype": None,
    "dtype": None,
}
LORA: dict[str, str | None] = {
    "r": "peft_lora_r",
    "lora_alpha": "peft_lora_alpha",
    "lora_dropout": "peft_lora_dropout",
    "target_modules": "peft_target_modules",
    "fan_in_fan_out": None,
    "bias": None,
    "task_type": None,
}
FINETUNING: dict[str, str | None] = {"trainables": "trainables"}
EARLY_STOPPING: dict[str, str | None] = {"early_stopping_patience": "early_stopping_patience"}
OUTPUTS: dict[str, str | None] = {"dirname": "output_dir", "save_merged_model": "merge"}
DATASET: dict[str, str | None] = dict.fromkeys(("path", "name", "split", "data_files"))
DATA: dict[str, str | None] = {"train_file": "data_files", "valid_file": "eval_data_files", "valid_size": "eval_size"}
PROMPT: dict[str, str | None] = {"with_input": "prompt_template", "without_input": "prompt_template_without_input"}
TRAINING_NAMES = {"max_length": "max_seq_length"}
TO_TRL = (
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "tf32"),
    *("lr_scheduler_kwargs", "label_smoothing_factor", "dataloader_num_workers", "torch_compile"),
)
STRATEGIES = ("eval_strategy", "evaluation_strategy", "save_strategy")
TRAINING_ELSE = ("report_to", "auto_find_batch_size", "load_best_model_at_end", "metric_for_best_model")
SECTIONS = ("model", "lora", "training", "finetuning", "early_stopping_callback", "dataset", "data", "outputs")
NORMALISATIONS = ("ln_f", "ln_1", "ln_2", "norm_f", "final_layer_norm", "input_layernorm", "post_attention_layernorm")
WHY_NOT = {
    "trust_remote_code": "code that comes with a model is not run",
    "torch_dtype": "--bf16 or --fp16 chooses the precision",
    "dtype": "--bf16 or --fp16 chooses the precision",
    "auto_find_batch_size": "a batch stays as large as it is set",
}
