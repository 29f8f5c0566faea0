"""What of Megatron-DeepSpeed is native here and what is replaced: the installer's smoke import.

Run with the checkout on PYTHONPATH: `python -m train.engine.megatron_deepspeed.report`. It applies the patches,
imports all that a pretraining run imports, and prints one line per patch.
"""

from __future__ import annotations

import importlib.util
import os

from train.engine.megatron_deepspeed import patches

_OPTIONAL_KERNELS = {
    "apex": "used on CUDA only, for layer norm and Adam",
    "flash_attn": "used on CUDA only, for attention without a score matrix",
}


def main() -> int:
    outcomes = patches.apply_all(patches.Run(), patches.disabled_names(os.environ))
    import deepspeed
    import megatron.model
    import megatron.training
    import torch
    from megatron.data import helpers

    print(f"Megatron-DeepSpeed imports from {os.path.dirname(os.path.dirname(megatron.model.__path__[0]))}")  # noqa: PTH120
    print(f"  torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, dataset helpers {helpers.__file__}")
    for name, purpose in _OPTIONAL_KERNELS.items():
        state = "native" if importlib.util.find_spec(name) else "not installed"
        print(f"  {name}: {state} ({purpose})")
    for outcome in outcomes:
        print(f"  patch {outcome.patch.name}: {outcome.state}" + (f" - {outcome.detail}" if outcome.detail else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
