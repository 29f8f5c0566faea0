#!/usr/bin/env bash
# Converts a SentencePiece tokenizer and a pretrained checkpoint to one Hugging Face folder, and verifies it.
#
#   bash convert_tokenizer_and_pretrained_model_to_huggingface_transformers.sh \
#       --input_tokenizer_file output/step1_train_tokenizer/NAME/NAME.model \
#       --input_model_max_length 2048 \
#       --input_model_dir output/step2_pretrain_model/checkpoint/JOB/global_step1000 \
#       --output_tokenizer_and_model_dir output/step3_upload_pretrained_model/JOB_global_step1000
#
# --help shows every flag.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/convert_tokenizer_and_pretrained_model_to_huggingface_transformers.py" "$@"
