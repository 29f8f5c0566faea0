"""Whether the compiled dataset helpers work beside torch.

    python -m train.engine.megatron_deepspeed.helpers_check FILE

A process of its own, as helpers that do not work can take their process with them. helpers_build.py runs it.
"""

from __future__ import annotations

import importlib.util
import sys

WRONG = 3  # exit status
SIZES, ORDER, SEQUENCE_LENGTH = (5, 3), (1, 0), 2
# Samples of two tokens and the one that follows, from the second document and then the first: where each begins,
# by the document's place in the order and the token in it.
EXPECTED = [[0, 0], [0, 2], [1, 1], [1, 3]]


def main() -> int:
    import numpy
    import torch  # noqa: F401 - it comes first in a run, too, and brings the C++ library that all share

    specification = importlib.util.spec_from_file_location("helpers", sys.argv[1])
    assert specification is not None and specification.loader is not None
    helpers = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(helpers)
    sizes, order = (numpy.array(values, dtype=numpy.int32) for values in (SIZES, ORDER))
    index = helpers.build_sample_idx(sizes, order, SEQUENCE_LENGTH, 1, sum(SIZES)).tolist()
    if index == EXPECTED:
        return 0
    print(f"build_sample_idx returned {index}, expected was {EXPECTED}")
    return WRONG


if __name__ == "__main__":
    raise SystemExit(main())
