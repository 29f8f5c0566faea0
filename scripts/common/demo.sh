#!/usr/bin/env bash
# Runs the five steps on this machine's CPU, on the docstrings of its own Python, and prints what came out.
#
# usage:    demo.sh [--output_dir DIR] [--engine auto|transformers|megatron-deepspeed] [--dry_run]
# example:  make demo
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/common/env.sh
source "${here}/env.sh"
exec "${PYTHON}" "${here}/demo.py" "$@"
