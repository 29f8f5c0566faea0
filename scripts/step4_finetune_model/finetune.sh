#!/usr/bin/env bash
# Finetunes a model on conversations; the loss is taken on the answers only.
#
# usage:    finetune.sh [--recipe NAME_OR_FILE] [--FLAG VALUE ...]     (--help lists all flags)
# example:  finetune.sh --recipe openassistant_zero3 --model_name_or_path output/gpt_0.125B \
#               --data_files chats.jsonl --output_dir output/gpt_0.125B_chat
# environment: TRAIN_PYTHON  interpreter to use; HF_TOKEN, WANDB_API_KEY  for the Hub and W&B
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/finetune.py" "$@"
