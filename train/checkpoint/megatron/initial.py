"""A run that begins with the weights of a checkpoint that is there: of a Hugging Face model, or of another run.

    load = prepare_initial(recipe, engine_commit)   # what the engine is told to load; refused when it is another model

Weights only: the optimizer, the learning rate's schedule and the order of the data begin anew, at step 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from train import checkpoint_files, resume
from train.checkpoint import kind
from train.checkpoint.megatron import configuration, qkv_layout, vocabulary
from train.checkpoint.megatron.families import GPT2
from train.checkpoint.megatron.layout import MegatronCheckpoint, open_checkpoint
from train.checkpoint.megatron.merge import PER_HEAD
from train.errors import UserError, refuse
from train.recipe import PretrainRecipe
from train.run_folder import Load

_ERF_GELU = "--no-bias-gelu-fusion"
_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "ffn_hidden_size": "ffn_hidden_size",
    "norm_epsilon": "layernorm_epsilon",
}


def prepare_initial(recipe: PretrainRecipe, engine_commit: str | None) -> Load:
    """What to load for `--initial_checkpoint_dir`.

    Args:
        recipe: of the run that begins.
        engine_commit: the version of Megatron-DeepSpeed that will load it.

    Raises:
        UserError: it is no whole checkpoint of Megatron-DeepSpeed, or of another model or layout than the recipe's; all
            differences at once.
    """
    given = recipe.checkpoint.initial_checkpoint_dir
    assert given is not None
    if not given.is_dir():
        raise UserError(f"--initial_checkpoint_dir {given} is not a folder: name a checkpoint, or what holds it.")
    folder, _ = kind.resolve(given)
    if (folder / "config.json").is_file():
        raise UserError(
            f"--initial_checkpoint_dir {given} is a Hugging Face model: make a checkpoint of it first, by"
            " scripts/step2_pretrain_model/convert_huggingface_model_to_megatron_deepspeed.sh."
        )
    if (folder / checkpoint_files.FILES).is_file():  # upstream alone writes no list
        damage = checkpoint_files.damage(folder, contents=resume.is_read_whole(folder))
        refuse(
            f"--initial_checkpoint_dir {folder} is damaged ({problem}): copy or import it again." for problem in damage
        )
    checkpoint = open_checkpoint(folder)
    problems = [*_problems(recipe, checkpoint), *_order_problems(checkpoint, engine_commit)]
    refuse(f"--initial_checkpoint_dir {given}: {problem}" for problem in problems)
    rows = checkpoint.saved.padded_vocab_size
    assert rows is not None
    return Load(
        folder.name, vocabulary_divisor=rows // recipe.parallel.tensor_parallel_size, initial_from=folder.parent
    )


def _problems(recipe: PretrainRecipe, checkpoint: MegatronCheckpoint) -> Iterator[str]:
    model, parallel, arguments = recipe.model, recipe.parallel, checkpoint.arguments
    family = configuration.family_of(arguments)
    wanted = "gpt2" if model.architecture == "gpt2" else "llama"
    if family.name != wanted:
        yield f"it holds a {family.name}, --architecture is {model.architecture}."
        return
    for ours, theirs in _SAME.items():
        value = getattr(arguments, theirs, None) or arguments.num_attention_heads
        if getattr(model, ours) != value:
            yield f"it has {ours} {value}, the recipe {getattr(model, ours)}; pass --{ours} {value}."
    if model.tie_word_embeddings != configuration.is_tied(arguments):
        is_tied = configuration.is_tied(arguments)
        yield f"its tie_word_embeddings is {is_tied}; pass --tie_word_embeddings {is_tied}."
    if family is GPT2:
        positions = arguments.max_position_embeddings
        if model.sequence_length != positions:
            yield f"it has {positions} learned positions; pass --sequence_length {positions}."
        if configuration.activation(arguments) == "gelu" and _ERF_GELU not in parallel.megatron_arguments:
            yield f"its GELU is the erf form; pass --megatron_arguments={_ERF_GELU}."
    elif float(getattr(arguments, "rope_theta", 10000)) != model.rope_theta:
        yield f"its rope_theta is {arguments.rope_theta}, the recipe's {model.rope_theta:g}; pass --rope_theta."
    yield from _layout_problems(recipe, checkpoint)


def _order_problems(checkpoint: MegatronCheckpoint, engine_commit: str | None) -> Iterator[str]:
    """Versions read the fused query, key and value in two orders; the other one trains on scrambled attention."""
    order, known = qkv_layout.find(checkpoint, vocab_size=checkpoint.saved.padded_vocab_size or 0)
    wanted = qkv_layout.order_of(engine_commit) or PER_HEAD
    if order != wanted:
        yield (
            f"its query, key and value lie {order} ({known}), and Megatron-DeepSpeed {(engine_commit or 'unknown')[:8]}"
            f" reads them {wanted}: use the version it was made with, or export it and import it for this one"
            " (--query_key_value_order)."
        )


def _layout_problems(recipe: PretrainRecipe, checkpoint: MegatronCheckpoint) -> Iterator[str]:
    saved, parallel = checkpoint.saved, recipe.parallel
    again = "import it again for this layout, or train in that one"
    if saved.tensor_parallel_size != parallel.tensor_parallel_size:
        yield (
            f"it is cut for {saved.tensor_parallel_size} tensor ranks, --tensor_parallel_size is"
            f" {parallel.tensor_parallel_size}: {again}."
        )
    if saved.has_pipeline_module == parallel.no_pipeline_parallel:
        form = "is" if saved.has_pipeline_module else "is not"
        yield f"its form {form} that of the pipeline module, --no_pipeline_parallel says otherwise: {again}."
    needed, rows = vocabulary.engine_vocab_size(recipe.data.input_tokenizer_file), saved.padded_vocab_size or 0
    if needed > rows:
        yield f"it has {rows} vocabulary rows, the engine needs {needed} for --input_tokenizer_file: {again}."
