#!/usr/bin/env bash
# Encodes documents into the .bin and .idx that pretraining reads. All flags: preprocess_data.sh --help
#
# Usage:
#   preprocess_data.sh --input 'corpus/*.jsonl' --input_tokenizer_file TOKENIZER.model --output_prefix data/corpus
#   preprocess_data.sh --input_file_dir corpus --input_tokenizer_file TOKENIZER.model --output_file_dir data
#
# Environment:
#   TRAIN_PYTHON  the Python that has the packages, instead of the one scripts/common/env.sh finds

set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/step2_pretrain_model/preprocess_data.py" "$@"
