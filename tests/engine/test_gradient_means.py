"""Gradients that are summed over data-parallel ranks while others are still to come."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from train.engine.megatron_deepspeed import gradient_means
from train.engine.megatron_deepspeed.gradient_means import Bucket, buckets


def test_buckets_cover_each_buffer_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_means, "_BUCKET_ELEMENTS", 10)
    assert buckets([[1, 2], [4, 3, 8, 5, 6]], [4, 28], late=()) == [
        Bucket(1, 15, 28, (4, 3)),  # 11 elements and 2 of padding
        Bucket(1, 4, 15, (2, 1)),
        Bucket(1, 0, 4, (0,)),
        Bucket(0, 0, 4, (1, 0)),  # the small buffer last
    ]


def test_a_parameter_that_is_finished_late_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_means, "_BUCKET_ELEMENTS", 10)
    assert buckets([[4, 3, 8]], [16], late={(0, 1)}) == [
        Bucket(0, 7, 16, (2,)),
        Bucket(0, 4, 7, (1,)),
        Bucket(0, 0, 4, (0,)),
    ]


_RANK = """
import sys, torch
from train.engine.megatron_deepspeed import gradient_means
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
gradient_means._BUCKET_ELEMENTS = 6
sizes = [[4, 3, 8, 5], [2]]
flats = [torch.zeros(22), torch.zeros(2)]
views = [list(flats[0].split([*sizes[0], 2])), list(flats[1].split(sizes[1]))]
means = gradient_means.GradientMeans(flats, sizes, torch.distributed.group.WORLD, {(0, 1)})
same = torch.Generator().manual_seed(5)
for step in range(3):
    for flat in flats:
        flat.zero_()
    given = torch.randn(2, 3, 22, generator=same)  # rank, micro batch, element
    means.begin(3)
    sent = []
    for micro in range(3):
        # the ranks finish their parameters in another order, and the second rank lacks one
        for number in ((3, 2, 1, 0), (0, 3, 1, 2))[rank]:
            if number == 0 and rank == 1 and step == 1:
                continue
            begin = sum(sizes[0][:number])
            views[0][number] += given[rank, micro][begin : begin + sizes[0][number]]
            means.added(0, number)
        sent.append(len(means._works))
    assert sent[:2] == [0, 0] and sent[2] > 0, sent
    views[1][0] += given[rank, 0, :2]
    views[0][1] *= 2  # as a sum over stages would
    means.finish()
    wanted = given.sum(dim=1)
    wanted[:, 4:7] *= 2
    wanted[:, 20:] = 0
    if step == 1:
        wanted[1, :4] = 0
    torch.testing.assert_close(flats[0], wanted.mean(dim=0))
    torch.testing.assert_close(flats[1], given[:, 0, :2].mean(dim=0))
means.added(0, 0)  # outside of a step: nobody's affair
flats[0].copy_(torch.arange(22.0) + rank)
means.finish()  # without a beginning it does everything
torch.testing.assert_close(flats[0], torch.arange(22.0) + 0.5)
means.begin(1)
means.added(0, 3)
try:
    means.added(0, 3)
except RuntimeError as error:
    assert "early-reduction" in str(error)
    print("told")
"""


def test_means_are_those_of_all_gradients(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(tmp_path), str(rank)], stdout=pipe, stderr=pipe, text=True)
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in running]
    assert [said.strip() for said, _ in ended] == ["told"] * 2, [errors[-1500:] for _, errors in ended]
