#!/usr/bin/env bash
# Times a matrix product and all-reduce on every node of this job, and names the slow ones.
#
# Usage:   scripts/common/measure_nodes.sh [--hostfile FILE] [--output measured_nodes.json]
# Example: scripts/common/measure_nodes.sh --hostfile hostfile --output measured_nodes.json
# See --help for all options. Exit code 0: none is slow; 2: the slow ones are named.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/measure_nodes.py" "$@"
