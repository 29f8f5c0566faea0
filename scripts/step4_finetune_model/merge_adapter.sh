#!/usr/bin/env bash
# Puts a LoRA adapter into its base model's weights.
#
# usage:    merge_adapter.sh --adapter FOLDER --output_dir FOLDER [--model_name_or_path BASE]   (--help lists all flags)
# example:  merge_adapter.sh --adapter output/gpt_0.125B_chat --output_dir output/gpt_0.125B_chat_merged
# environment: TRAIN_PYTHON  interpreter to use; HF_TOKEN  for the Hub
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/merge_adapter.py" "$@"
