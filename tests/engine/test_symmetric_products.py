"""The products of tensor ranks over shared memory: the algorithm itself, in processes that share memory on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_RANK = """
import pathlib, sys
import numpy as np, torch
from train.engine.megatron_deepspeed.symmetric_products import SymmetricProducts

folder, rank, ranks = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
SIZE = 1 << 16


class Files:
    '''Memory that every rank maps; what lies beyond what was asked for must stay as it is.'''

    def __init__(self):
        self.rank = rank
        self.maps = [
            torch.from_numpy(np.memmap(folder / f"memory{other}", np.uint8, "r+", shape=(SIZE,)))
            for other in range(ranks)
        ]

    def __call__(self, size):
        self.asked = size
        return self

    def get_buffer(self, other, sizes, dtype, storage_offset=0):
        count = torch.Size(sizes).numel()
        begin, end = (place * dtype.itemsize for place in (storage_offset, storage_offset + count))
        assert 0 <= begin <= end <= self.asked, (begin, end, self.asked)
        return self.maps[other][begin:end].view(dtype).view(sizes)

    def barrier(self, channel=0):
        torch.distributed.barrier()


products = SymmetricProducts(Files(), ranks)
same = torch.Generator().manual_seed(1)
for turn in range(3):  # memory is used again and again
    whole = torch.randn(4 * ranks, 2, 6, generator=same)
    matrix, bias = torch.randn(5, 6, generator=same).t(), torch.randn(5, generator=same)
    found, product = products.join_times(whole.chunk(ranks)[rank], matrix, bias)
    assert torch.equal(found, whole)
    torch.testing.assert_close(product, whole @ matrix + bias)
    torch.testing.assert_close(products.join_times(whole.chunk(ranks)[rank], matrix)[1], whole @ matrix)
    every = [torch.randn(4 * ranks, 2, 6, generator=same) for _ in range(ranks)]
    matrices = [torch.randn(6, 3, generator=same) for _ in range(ranks)]
    shared = products.times_share(every[rank], matrices[rank])
    wanted = sum(values @ matrix for values, matrix in zip(every, matrices))
    torch.testing.assert_close(shared, wanted.chunk(ranks)[rank])
print("equal")
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_products_over_shared_memory_are_those_of_the_whole(ranks: int, tmp_path: Path) -> None:
    for rank in range(ranks):
        (tmp_path / f"memory{rank}").write_bytes(bytes(1 << 16))
    words = [[sys.executable, "-c", _RANK, str(tmp_path), str(rank), str(ranks)] for rank in range(ranks)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) for argv in words]
    ended = [process.communicate(timeout=120) for process in running]
    assert [said.strip() for said, _ in ended] == ["equal"] * ranks, [errors[-1500:] for _, errors in ended]
