#!/usr/bin/env bash
# Says what to install when the interpreter cannot make the virtual environment. Called by the Makefile.
#
# usage: check_python.sh [PYTHON]
set -euo pipefail
python="${1:-python3}"
if ! command -v "${python}" >/dev/null; then
    echo "error: ${python} is not installed: install Python 3.11 or newer, or name one: make install PYTHON3=/path/to/python3" >&2
    exit 2
fi
if ! "${python}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("${python}" --version) is too old: Python 3.11 or newer is needed; name one: make install PYTHON3=/path/to/python3" >&2
    exit 2
fi
if ! "${python}" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: ${python} cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)" >&2
    exit 2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "warning: no C++ compiler: DeepSpeed (ZeRO) compiles a small part of itself (Debian: apt-get install g++)" >&2
fi
