"""Pipeline stages that take the same time, not such with as many layers: train/checkpoint/megatron/stages.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from train.checkpoint.megatron import stages
from train.engine.megatron_deepspeed.patches import Patch, Run, disabled_names


def is_switched_off(environment: Mapping[str, str]) -> bool:
    """Whether all stages are to have the same number of layers, as upstream has them."""
    return PATCH.name in disabled_names(environment)


def _apply(run: Run) -> str:
    from deepspeed.runtime.pipe.module import PipelineModule
    from megatron import get_args

    partition = PipelineModule._partition_layers

    @functools.wraps(partition)
    def balance(self: Any, method: str = "uniform") -> None:
        args = get_args()
        if method != "type:transformer" or self.num_stages == 1:
            partition(self, method)
            return
        counts = run.layers_per_stage or stages.of_arguments(args, self.num_stages)
        args.layers_per_stage = list(counts)  # saved with every checkpoint
        first = self._find_layer_type("transformer")[0]
        self.parts = [0, *(first + count for count in accumulate(counts[:-1])), len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        if self.global_rank == 0:
            print(f"layers of each pipeline stage: {' '.join(map(str, counts))}", flush=True)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    PipelineModule._partition_layers = balance
    return "PipelineModule._partition_layers: the last stage, which also makes the logits, gets fewer layers"


PATCH = Patch(
    name="balanced-stages",
    reason="all pipeline stages wait for the last one, which makes the logits beside as many layers as the others have",
    affected="all upstream versions, with pipeline stages",
    apply=_apply,
)
