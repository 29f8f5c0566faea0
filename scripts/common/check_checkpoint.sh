#!/usr/bin/env bash
# Checks one checkpoint, or all of a job: is it whole, can it be resumed, reshaped, exported.
#
# Usage:   scripts/common/check_checkpoint.sh --input_model_dir CHECKPOINT_OR_JOB_FOLDER [--json]
# Example: scripts/common/check_checkpoint.sh --input_model_dir output/step2_pretrain_model/checkpoint/JOB
# See --help for all options. Exit code 0: whole; 3: damaged; 2: no checkpoint.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/check_checkpoint.py" "$@"
