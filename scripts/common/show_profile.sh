#!/usr/bin/env bash
# Shows where the time of a recorded step went on each rank (--profile_step of pretrain.sh and finetune.sh).
#
# usage:    show_profile.sh DIR [--job_name NAME] [--step N] [--rank N]
#           (DIR: --output_model_dir of step 2, --output_dir of step 4)
# example:  show_profile.sh output/step2_pretrain_model
# Exit code 0: shown; 2: there is no such recording.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [[ $# -gt 0 && "$1" != -* ]]; then
    set -- --folder "$@"
fi
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/show_profile.py" "$@"
