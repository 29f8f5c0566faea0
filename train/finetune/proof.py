"""What a finetuning saved, loaded anew in the launcher and held against what the training process said of it.

checks = prove(plan, folder)
verification.write(folder.model_dir, checks)
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from train.finetune import methods
from train.finetune.folder import FinetuneFolder, Plan


def prove(plan: Plan, folder: FinetuneFolder) -> dict[str, Any]:
    """Puts the tokenizer beside the model and checks both.

    Returns:
        `weights`, `logits`, `tokenizer` and `config` as `train.checkpoint.verify.verify` has them; of a full or partial
        training `changes`, tensors by whether they were to change and did; `best`, the checkpoint that was kept.

    Raises:
        VerificationError: it is not what was trained, or weights changed that were not to be trained.
    """
    from train.checkpoint import verify
    from train.finetune import adapter, changes, lora

    told = json.loads(folder.saved.read_text(encoding="utf-8"))
    for file in folder.tokenizer_dir.iterdir():  # the folder is loaded as its users will
        shutil.copyfile(file, folder.model_dir / file.name)
    settings = plan.finetune
    if methods.of(settings) == "lora":
        packed = lora.quantization(settings)
        checks = adapter.prove(plan.model_dir, folder.model_dir, folder.golden_logits, quantization=packed)
    else:
        checks = verify.verify(folder.model_dir, verify.Source(golden_logits=folder.golden_logits))
        checks["changes"] = changes.compare(plan.model_dir, folder.model_dir, trained=set(told["trained"]))
    checks["weights"] |= {"compared_with": "the live weights of the training process", **told["weights"]}
    checks["tokenizer"] |= {"compared_with": f"none: {_tokenizer_files(plan)}, and a chat template"}
    print(verify.summary(checks))
    if "changes" in checks:
        print(changes.summary(checks["changes"]))
    return checks | {"best": told["best"]}


def _tokenizer_files(plan: Plan) -> str:
    named = plan.finetune.tokenizer_name_or_path
    files = "the base model's own files" if named is None else f"the files of {named}"
    if plan.added_tokens:
        return f"{files} with {plan.added_tokens:,} tokens added"
    return f"{files}, byte for byte"
