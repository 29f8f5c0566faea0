#!/usr/bin/env bash
# Runs steps 1 to 5 in a row from one YAML with a section of flags for each step, here or as a chain of jobs.
#
# usage:    run_all.sh --recipe FILE [--submit slurm|gridengine|pbs] [--dry_run]
# example:  run_all.sh --recipe my_steps.yaml --submit slurm
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/run_all.py" "$@"
