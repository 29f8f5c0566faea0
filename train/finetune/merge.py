"""A LoRA adapter into its base's weights: a model folder that needs no PEFT, with the logits of base + adapter.

checks = merge(base_dir, adapter_dir, Path("merged"))
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from train.checkpoint import verification
from train.finetune import adapter, changes, special_ids

_PROBE_TOKENS = 32


def merge(base_dir: Path, adapter_dir: Path, to: Path) -> dict[str, Any]:
    """Writes the merged model, in the base's type, into the new folder `to`, and proves it.

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

    model = adapter.load(base_dir, adapter_dir, dtype="auto")
    input_ids = torch.arange(min(_PROBE_TOKENS, model.config.vocab_size)).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    dtype = str(model.get_base_model().dtype)
    to.mkdir()
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
