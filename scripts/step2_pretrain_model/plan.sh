#!/usr/bin/env bash
# Predicts memory and speed of every layout of a model on some GPUs, and ranks those that fit.
#
# usage:    plan.sh --num_gpus N [--recipe NAME_OR_FILE] [--FLAG VALUE ...]     (--help lists all flags)
# example:  plan.sh --model_size gpt_1.3B --num_gpus 8 --gpu h200
# Exit code 0: a layout fits; 2: none does, or a setting is wrong.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/../common/env.sh"
exec "${PYTHON}" "${here}/plan.py" "$@"
