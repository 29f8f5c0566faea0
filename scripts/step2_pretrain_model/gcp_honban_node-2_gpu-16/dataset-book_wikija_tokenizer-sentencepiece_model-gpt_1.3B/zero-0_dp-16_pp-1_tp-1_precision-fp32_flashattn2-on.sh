#!/usr/bin/env bash
# The seeds' pretraining of GPT 1.3B on books and the Japanese Wikipedia, on 2 nodes of 8 GPUs: pretrain.sh with the
# recipe gpt_1.3B_book_wikija_fp32. It does what its name says: fp32 (the original set fp16), ZeRO 0, 16 data parallel
# ranks, attention by torch's kernels (flash-attn knows no fp32).
#
# usage:    zero-0_...sh --input_tokenizer_file FILE --output_model_dir DIR --wandb_entity ENTITY \
#               --wandb_project PROJECT [--save_interval STEPS] [--wandb_tag TAG]
#           and any flag of pretrain.sh, such as --data_path DIR ... or --rehearse
# example:  zero-0_...sh --input_tokenizer_file tokenizer.model --output_model_dir output/ --save_interval 1000 \
#               --wandb_entity me --wandb_project p
# environment: TRAIN_RECIPE  another recipe instead, to try the command with a small model
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "${here}/../../pretrain.sh" --recipe "${TRAIN_RECIPE:-gpt_1.3B_book_wikija_fp32}" "$@"
