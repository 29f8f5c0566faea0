#!/usr/bin/env bash
# Lets a model answer: one prompt, a file of them, or a chat in the terminal.
#
# usage:    generate.sh --model_name_or_path MODEL --prompt TEXT | --prompt_file FILE | --chat [--FLAG VALUE ...]
# example:  generate.sh --model_name_or_path output/gpt_0.125B_chat --chat
# environment: TRAIN_PYTHON  interpreter to use; HF_TOKEN  for the Hub
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/generate.py" "$@"
