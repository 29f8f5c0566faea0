#!/usr/bin/env bash
# Finds the interpreter that has the packages. Every launcher in scripts/ sources this file.
#
# Sets: PROJECT_ROOT  the checkout this file stands in
#       PYTHON        first of: $TRAIN_PYTHON, the active virtual or conda environment, PROJECT_ROOT/.venv, python3
# Touches nothing else: no ~/.bashrc, no working directory.

PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -n "${TRAIN_PYTHON:-}" ]]; then
    PYTHON="${TRAIN_PYTHON}"
elif [[ -n "${VIRTUAL_ENV:-}" && -x "${VIRTUAL_ENV}/bin/python" ]]; then
    PYTHON="${VIRTUAL_ENV}/bin/python"
elif [[ -n "${CONDA_PREFIX:-}" && -x "${CONDA_PREFIX}/bin/python" ]]; then
    PYTHON="${CONDA_PREFIX}/bin/python"
elif [[ -x "${PROJECT_ROOT}/.venv/bin/python" ]]; then
    PYTHON="${PROJECT_ROOT}/.venv/bin/python"
else
    PYTHON="$(command -v python3 || true)"
fi
if [[ -z "${PYTHON}" ]] || ! (cd / && "${PYTHON}" -c 'import train') 2>/dev/null; then
    echo "error: ${PYTHON:-python3} has no package 'train': run 'make install' in ${PROJECT_ROOT}, activate its environment, or set TRAIN_PYTHON." >&2
    exit 2
fi
export PROJECT_ROOT PYTHON
