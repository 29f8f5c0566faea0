#!/usr/bin/env bash
# Writes an ssh configuration for the nodes of a job on the GCP play environment, whose ssh servers listen on port 22.
#
# Usage:   scripts/common/create_ssh_config_file_for_gcp_play_multi_node_multi_gpu.sh [--output ssh_config]
# Example: pretrain.sh and finetune.sh take the file with --ssh_config ssh_config
# See --help for all options.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/create_ssh_config_file.sh" --ssh_port 22 "$@"
