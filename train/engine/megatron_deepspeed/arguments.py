"""Megatron's command-line arguments, rendered from the recipe. Names are upstream's."""

from __future__ import annotations

from collections.abc import Sequence

from train.cluster.allocation import Allocation
from train.recipe import PretrainRecipe
from train.run_folder import RunFolder


def megatron_arguments(
    recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder, data_path: Sequence[str]
) -> tuple[str, ...]:
    """What `pretrain_gpt.py` is given.

    Args:
        recipe: a resolved recipe.
        allocation: where it runs.
        run_folder: where it writes.
        data_path: one prefix, or weights and prefixes in turn.
    """
    return (
        *_model(recipe),
        *_training(recipe),
        *_data(recipe, run_folder, data_path),
        *_parallel(recipe, allocation, run_folder),
        *_files(recipe, run_folder),
    )


def _model(recipe: PretrainRecipe) -> tuple[str, ...]:
    model = recipe.model
    words = [
        *("--num-layers", str(model.num_layers)),
        *("--hidden-size", str(model.hidden_size)),
        *("--ffn-hidden-size", str(model.ffn_hidden_size)),
        *("--num-attention-heads", str(model.num_attention_heads)),
        *("--seq-length", str(model.sequence_length)),
        *("--max-position-embeddings", str(model.sequence_length)),
        *("--init-method-std", str(model.init_method_std)),
        *("--layernorm-epsilon", str(model.norm_epsilon)),
        *("--hidden-dropout", str(model.dropout)),
        *("--attention-dropout", str(model.dropout)),
    ]
    if model.architecture != "gpt2":
        words += [
            *("--num-key-value-heads", str(model.num_key_value_heads)),
            *("--normalization", "rmsnorm"),
            "--swiglu",
            "--disable-bias-linear",
            "--use-rotary-position-embeddings",
            *("--rotary-position-embeddings-theta", f"{model.rope_theta:.0f}"),
        ]
    if not model.tie_word_embeddings:
        words.append("--untie-embeddings-and-output-weights")
    return tuple(words)


def _training(recipe: PretrainRecipe) -> tuple[str, ...]:
    training, length = recipe.training, recipe.model.sequence_length
    assert training.global_batch_size is not None and training.lr_decay_tokens is not None
    # In samples, not tokens: upstream's token schedule lags one step behind, which sample counts do not.
    samples = recipe.train_steps * training.global_batch_size
    words = (
        *("--micro-batch-size", str(training.micro_batch_size)),
        *("--global-batch-size", str(training.global_batch_size)),
        *("--train-samples", str(samples)),
        *("--lr", str(training.lr)),
        *("--min-lr", str(training.min_lr)),
        *("--lr-decay-style", training.lr_decay_style),
        *("--lr-decay-samples", str(-(-training.lr_decay_tokens // length))),
        *("--lr-warmup-samples", str(-(-training.lr_warmup_tokens // length))),
        *("--weight-decay", str(training.weight_decay)),
        *("--adam-beta1", str(training.adam_beta1)),
        *("--adam-beta2", str(training.adam_beta2)),
        *("--adam-eps", str(training.adam_epsilon)),
        *("--clip-grad", str(training.clip_grad)),
        *("--seed", str(training.seed)),
    )
    return words if training.precision == "fp32" else (*words, f"--{training.precision}")


def _data(recipe: PretrainRecipe, run_folder: RunFolder, data_path: Sequence[str]) -> tuple[str, ...]:
    return (
        *("--data-path", *data_path),
        *("--data-impl", "mmap"),
        *("--data-cache-path", str(run_folder.data_cache_dir)),
        *("--split", recipe.data.split),
        *("--num-workers", str(recipe.data.num_workers)),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(recipe.data.input_tokenizer_file.absolute())),
    )


def _parallel(recipe: PretrainRecipe, allocation: Allocation, run_folder: RunFolder) -> tuple[str, ...]:
    parallel = recipe.parallel
    words = [
        *("--tensor-model-parallel-size", str(parallel.tensor_parallel_size)),
        *("--pipeline-model-parallel-size", str(parallel.pipeline_parallel_size)),
        *("--distributed-backend", "nccl" if allocation.device == "cuda" else "gloo"),
        "--deepspeed",
        *("--deepspeed_config", str(run_folder.deepspeed_config)),
        *("--zero-stage", str(parallel.zero_stage)),
    ]
    if parallel.no_pipeline_parallel:
        words.append("--no-pipeline-parallel")
    if parallel.sequence_parallel:
        words.append("--sequence-parallel")
    if allocation.device == "cuda" and parallel.attention != "eager":
        words.append("--use-flash-attn-v2")  # by torch's kernels unless flash-attn is asked for: flash_attention patch
    if parallel.activation_checkpoint:
        words += ["--checkpoint-activations", "--deepspeed-activation-checkpointing"]
    # CUDA kernels of upstream's own: not on a CPU, and the softmax ones no longer compile with CUDA 13
    words += ["--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion"]
    return tuple(words)


def _files(recipe: PretrainRecipe, run_folder: RunFolder) -> tuple[str, ...]:
    checkpoint, logging = recipe.checkpoint, recipe.logging
    evaluates = checkpoint.eval_interval > 0 and checkpoint.eval_iters > 0
    words = [
        *("--save", str(run_folder.checkpoint_dir)),
        *("--save-interval", str(checkpoint.save_interval)),
        # upstream divides by the interval even when it evaluates nothing
        *("--eval-interval", str(checkpoint.eval_interval if evaluates else recipe.train_steps + 1)),
        *("--eval-iters", str(checkpoint.eval_iters if evaluates else 0)),
        *("--log-interval", str(logging.log_interval)),
        *("--tensorboard-dir", str(run_folder.tensorboard_dir)),
        *("--tensorboard-queue-size", "1"),
        "--log-batch-size-to-tensorboard",
        "--log-validation-ppl-to-tensorboard",
    ]
    if logging.log_optimizer_state:
        words.append("--log-optimizer-states-to-tensorboard")
    load = run_folder.load if recipe.overwrite else run_folder.what_to_load()
    if load is not None:
        words += ["--load", str(load.initial_from or run_folder.checkpoint_dir), "--load-tag", load.tag]
        words += ["--finetune"] if load.initial_from else []  # weights only, from step 0
        words += ["--universal-checkpoint"] if load.is_universal else []
        if load.vocabulary_divisor is not None:
            words += ["--make-vocab-size-divisible-by", str(load.vocabulary_divisor)]
    return tuple(words)
