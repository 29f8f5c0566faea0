"""A LoRA adapter into its base's weights: a model folder that needs no PEFT, with the logits of base + adapter.

checks = merge(base_dir, adapter_dir, Path("merged"))                           # what finetune.sh --merge calls
merge_adapter(MergeSettings("output/chat", output_dir=Path("output/merged")))   # what merge_adapter.sh calls
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import manifest, outputs
from train import settings as settings_module
from train.checkpoint import lineage, verification
from train.errors import UserError
from train.settings import setting

STEP = "merge_adapter"
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class MergeSettings:
    """The settings of `merge_adapter.py`."""

    adapter: str = setting(help="adapter folder, as a LoRA finetuning makes it, or name on the Hub")
    output_dir: Path = setting(help="folder to make: the model with the adapter in its weights")
    model_name_or_path: str | None = setting(None, help="the base model; the one that the adapter names when not given")
    overwrite: bool = setting(False, help="replace an existing output_dir", flag_only=True)
    dry_run: bool = setting(False, help="print what would be done", flag_only=True)


def merge_adapter(settings: MergeSettings) -> int:
    """Merges an adapter that is there.

    Raises:
        UserError: base or adapter are not to be found, were not proven, or do not fit each other.
        VerificationError: the merged model is not what base and adapter are.
    """
    if settings.dry_run:
        base = settings.model_name_or_path or "the base that it names"
        print(f"would merge {settings.adapter} into {base} and write {settings.output_dir}")
        return 0
    from train.checkpoint import verify
    from train.finetune import changes
    from train.generate import model as models

    if settings.model_name_or_path is None:
        sources = models.find(settings.adapter, flag="--adapter")
    else:
        sources = models.find(settings.model_name_or_path, settings.adapter)
    if sources.adapter is None:
        raise UserError(f"--adapter {settings.adapter} is a whole model, there is nothing to merge.")
    started, plain, inputs = time.time(), settings_module.to_plain(settings), _inputs(sources)
    outputs.refuse_inputs(settings.output_dir, [sources.base, sources.adapter])
    if not settings.overwrite and manifest.is_done(settings.output_dir, step=STEP, settings=plain, inputs=inputs):
        print(f"{settings.output_dir} is there for the same adapter and base: nothing to do.")
        return 0
    with outputs.new_folder(settings.output_dir, overwrite=settings.overwrite) as unfinished:
        checks = merge(sources.base, sources.adapter, unfinished)
        verification.write(unfinished, checks)
        results = {"parameters": checks["weights"]["parameters"], "lineage": lineage.trace(inputs)}
        manifest.write(
            unfinished / manifest.FILE_NAME, step=STEP, settings=plain, inputs=inputs, results=results, started=started
        )
    print(verify.summary(checks))
    print(changes.summary(checks["changes"]))
    print(f"wrote {settings.output_dir}")
    return 0


def _inputs(sources: Any) -> list[Path]:
    records = [folder / manifest.FILE_NAME for folder in (sources.adapter, sources.base)]
    return [*(file for file in records if file.is_file()), *sources.files]


def merge(base_dir: Path, adapter_dir: Path, to: Path) -> dict[str, Any]:
    """Writes the merged model, in the base's type, into the folder `to`, which is made or empty, and proves it.

    Only the adapted modules' weights may differ from the base's, and the logits of what is on disk must be those that
    base and adapter give side by side.

    Returns:
        `weights`, `logits`, `tokenizer`, `config` and `changes`, for `train.checkpoint.verification.write`.

    Raises:
        UserError: base and adapter cannot be loaded, or do not fit each other.
        VerificationError: the merged model is not what base and adapter are.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from train.checkpoint import verify
    from train.finetune import adapter, changes, special_ids

    model = adapter.load(base_dir, adapter_dir, dtype="auto")
    input_ids = torch.arange(min(_PROBE_TOKENS, model.config.vocab_size)).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    dtype = str(model.get_base_model().dtype)
    to.mkdir(exist_ok=True)
    golden = to.with_name(f"{to.name}.golden_logits.safetensors")
    save_file({"input_ids": input_ids, "logits": logits.contiguous()}, golden, metadata={"dtype": dtype})
    try:
        merged = model.merge_and_unload(safe_merge=True)
        special_ids.agree(merged, special_ids.of(AutoTokenizer.from_pretrained(adapter_dir, local_files_only=True)))
        merged.save_pretrained(to)
        for name in verification.TOKENIZER_FILES:
            if (adapter_dir / name).is_file():
                shutil.copyfile(adapter_dir / name, to / name)
        checks = verify.verify(to, verify.Source(golden_logits=golden))
    finally:
        golden.unlink()
    trained = {f"{name.removeprefix('base_model.model.')}.weight" for name in adapted}
    checks["logits"]["compared_with"] = "base and adapter side by side"
    checks["weights"]["compared_with"] = "the base's in all modules without an adapter: see changes"
    checks["tokenizer"]["compared_with"] = "none: the adapter's own files, byte for byte"
    return checks | {"changes": changes.compare(base_dir, to, trained)}
