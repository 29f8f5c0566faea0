#!/usr/bin/env bash
# Writes a report of a pretraining or finetuning run: one HTML file with its curves, needing no account and no network.
#
# usage:    report.sh DIR [--output FILE] [--job_name NAME]     (DIR: --output_model_dir of step 2, --output_dir of step 4)
# example:  report.sh output/step2_pretrain_model --output report.html
# Exit code 0: written; 2: DIR is no run, or FILE is something else.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [[ $# -gt 0 && "$1" != -* ]]; then
    set -- --folder "$@"
fi
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/report.py" "$@"
