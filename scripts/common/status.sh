#!/usr/bin/env bash
# Says how a pretraining or finetuning run is: job, step, loss, speed, time left, last checkpoint, how it ended.
#
# usage:    status.sh DIR [--job_name NAME] [--json]     (DIR: --output_model_dir of step 2, --output_dir of step 4)
# example:  status.sh output/step2_pretrain_model
# Exit code 0: answered; 2: DIR is no run.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [[ $# -gt 0 && "$1" != -* ]]; then
    set -- --folder "$@"
fi
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/status.py" "$@"
