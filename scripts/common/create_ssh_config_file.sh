#!/usr/bin/env bash
# Writes an ssh configuration for the nodes of this job; ~/.ssh/config is left alone.
#
# Usage:   scripts/common/create_ssh_config_file.sh [--output ssh_config] [--ssh_port 22] [--hostfile FILE]
# Example: scripts/common/create_ssh_config_file.sh && ssh -F ssh_config node2 hostname
# See --help for all options.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/create_ssh_config_file.py" "$@"
