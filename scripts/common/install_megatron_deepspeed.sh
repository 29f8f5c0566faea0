#!/usr/bin/env bash
# Installs Megatron-DeepSpeed at the pinned commit into PROJECT_ROOT/.cache/megatron-deepspeed/, whole or not at all.
#
# Usage:   scripts/common/install_megatron_deepspeed.sh [--repository URL_OR_FOLDER] [--ref REF] [--with_apex]
#              [--with_flash_attn] [--dry_run]
# Example: scripts/common/install_megatron_deepspeed.sh --repository /shared/Megatron-DeepSpeed
# See --help for all options. A checkout elsewhere is used by setting MEGATRON_DEEPSPEED_DIR.
set -euo pipefail
# shellcheck source=scripts/common/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON}" "${PROJECT_ROOT}/scripts/common/install_megatron_deepspeed.py" "$@"
