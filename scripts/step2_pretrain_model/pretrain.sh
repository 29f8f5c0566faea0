#!/usr/bin/env bash
# Pretrains a model from scratch.
#
# usage:    pretrain.sh [--recipe NAME_OR_FILE] [--FLAG VALUE ...]     (--help lists all flags)
# example:  pretrain.sh --recipe gpt_0.125B --input_tokenizer_file tokenizer.model \
#               --data_path data/ --output_model_dir output/
# environment: TRAIN_PYTHON  interpreter to use; MEGATRON_DEEPSPEED_DIR  a checkout elsewhere
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/pretrain.py" "$@"
