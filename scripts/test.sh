#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs every check and test.
#
#   scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env dev
cd "$ROOT"
say "ruff check"
"$VENV_PYTHON" -m ruff check .
say "ruff format --check"
"$VENV_PYTHON" -m ruff format --check .
say "mypy"
"$VENV_PYTHON" -m mypy
say "pytest"
"$VENV_PYTHON" -m pytest "$@"
