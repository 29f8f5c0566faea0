#!/usr/bin/env bash
# Measures a model: perplexity of texts, SQuAD, exact match, tasks of lm-evaluation-harness; before and after.
#
# usage:    evaluate.sh --model_name_or_path MODEL [--base_model MODEL] [--FLAG VALUE ...]     (--help lists all flags)
# example:  evaluate.sh --model_name_or_path output/chat --base_model output/base --question_files qa.jsonl
# environment: TRAIN_PYTHON  interpreter to use; HF_TOKEN  for the Hub
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/evaluate.py" "$@"
