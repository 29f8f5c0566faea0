#!/usr/bin/env bash
# Converts a Hugging Face GPT-2, Llama or Mistral to a checkpoint of Megatron-DeepSpeed, from which pretraining begins.
#
#   bash convert_huggingface_model_to_megatron_deepspeed.sh \
#       --input_model_dir output/step3_upload_pretrained_model/NAME \
#       --tensor_parallel_size 2 --pipeline_parallel_size 2 \
#       --output_checkpoint_dir output/step2_pretrain_model/initial/NAME_tp2_pp2
#
# --help shows every flag.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/convert_huggingface_model_to_megatron_deepspeed.py" "$@"
