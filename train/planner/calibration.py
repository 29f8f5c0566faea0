"""The planner's constants that no data sheet and no source tells, in one place, each with where it comes from."""

from __future__ import annotations

# --- memory ---
HEADROOM = 0.04  # of a GPU's memory, kept free for what the prediction does not see
LOGITS_KEPT = 1  # of the last stage's micro batches; without the patch last-outputs they are two
RESERVED_OVER_ALLOCATED = 1.02  # estimated: gpu_memory_gib is what the allocator reserved, with expandable segments
LIBRARIES_GIB = 0.3  # estimated: workspaces of cuBLAS and cuDNN, which come from torch's allocator
OUTSIDE_TORCH_GIB = 1.2  # estimated: CUDA context and kernels
NCCL_GIB = 1.0  # estimated: buffers of NCCL, where there is more than one rank

# --- speed ---
MATRIX_SHARE = 0.885  # of the data sheet, for endlessly large matrices: 788 TFLOP/s for 8192 cubed on an H200, measured
MATRIX_HALF_WIDTH = 300.0  # a product of [m, k] x [k, n] attains 1 / (1 + 300/m + 300/n + 300/k) of that
TRAINING_SHARE = 0.893  # of that, in training: GPT 1.28B on one H200 and in DP2, 50 steps each, measured
ATTENTION_HALF_LENGTH = 400.0  # attention at length s attains s / (s + 400)
NARROW_HEADS_SHARE = 0.75  # attention with heads narrower than 128, estimated
MEMORY_SHARE = 0.75  # of the data sheet's bandwidth, in passes of compiled kernels, estimated
LINK_SHARE = 0.75  # of NVLink's, for NCCL's bus bandwidth, estimated
NETWORK_SHARE = 0.85  # of the network's, estimated
TENSOR_OVERLAP = 0.65  # part of tensor ranks' exchanges that products hide: chosen so that TP2 on H200s comes out
COLLECTIVE_S = 20e-6  # start of one collective, estimated
PIPELINE_HOP_S = 150e-6  # one send and receive of DeepSpeed's pipeline engine, estimated
LAYER_LAUNCH_S = 0.7e-3  # Python and kernel launches of one layer, forward and backward: the GPU may wait, estimated
LAYER_IN_PARTS_LAUNCH_S = 1.7e-3  # of one of tensor ranks, which is compiled in parts, estimated
LAYER_GAP_S = 0.1e-3  # between the kernels of a layer and micro batch, whatever its size: profiles of PP2 x DP2 and PP4
LAYER_IN_PARTS_GAP_S = 0.3e-3  # of one of tensor ranks: profiles of TP2 and TP4
AS_FAST = 1.015  # predictions are no closer: a micro batch that is slower by less counts as fast as another
STEP_S = 15e-3  # data, log and Python around each step, estimated
