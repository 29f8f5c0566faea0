#!/usr/bin/env bash
# Writes a hostfile of the nodes of this job, with the processes of each.
#
# Usage:   scripts/common/create_hostfile.sh [--output hostfile] [--slots N | --ask_nodes]
# Example: scripts/common/create_hostfile.sh --output hostfile --ask_nodes --ssh_config ssh_config
# See --help for all options.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/create_hostfile.py" "$@"
