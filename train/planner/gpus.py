"""What a GPU and its links give at most, from the makers' data sheets; calibration.py says what of it is attained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU of a kind.

    Attributes:
        memory_gib: what torch calls its total memory.
        tflops: dense tensor-core TFLOP/s in bf16 and fp16.
        fp32_tflops: without tensor cores, as torch computes fp32 by default.
        memory_gb_s: bandwidth of its memory.
        link_gb_s: NVLink, one direction.
        network_gb_s: network of one GPU to another node, one direction, in the maker's own systems.
        attention_share: of `tflops`, reached by causal attention at head width 128 and long sequences.
    """

    memory_gib: float
    tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    attention_share: float


GPUS: dict[str, Gpu] = {
    # NVIDIA H200 data sheet (SXM): 141 GB, 4.8 TB/s, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways; DGX H200:
    # 400 Gb/s per GPU. Attention: measured, 0.075 us per token and layer of 16 heads x 128 at 2,048 tokens (cuDNN)
    "h200": Gpu(139.8, 989.0, 67.0, 4800.0, 450.0, 50.0, 0.405),
    # NVIDIA H100 data sheet (SXM5): 80 GB, 3.35 TB/s, else as the H200; attention as there
    "h100": Gpu(79.1, 989.0, 67.0, 3350.0, 450.0, 50.0, 0.405),
    # NVIDIA A100 data sheet (SXM4): 312 TFLOP/s, 2,039 and 1,555 GB/s, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s
    # per GPU. Attention: FlashAttention-2's paper, figure 5
    "a100_80": Gpu(79.1, 312.0, 19.5, 2039.0, 300.0, 25.0, 0.52),
    "a100_40": Gpu(39.4, 312.0, 19.5, 1555.0, 300.0, 25.0, 0.52),
}
