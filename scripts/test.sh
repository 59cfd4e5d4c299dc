#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs every check and test.
#
#   scripts/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# What the tests run that pip does not have, installed beside pip: a database, a browser, and SLURM with its network.
install_system_packages 'postgresql:/usr/lib/postgresql/*/bin/initdb' 'chromium:/usr/bin/chromium' \
    'slurmctld:/usr/sbin/slurmctld' 'slurmd:/usr/sbin/slurmd' 'slurm-client:/usr/bin/sbatch' 'munge:/usr/sbin/munged' \
    'iproute2:/*bin/ip' &
setup_env dev
wait
fetch_package transformer_engine 2.7.0 2.11.0 2.20.2
fetch_package trl 1.16.0
cd "$ROOT"
say "ruff check"
"$VENV_PYTHON" -m ruff check .
say "ruff format --check"
"$VENV_PYTHON" -m ruff format --check .
say "mypy"
"$VENV_PYTHON" -m mypy
say "pytest"
# Whole files side by side: what they set up is shared within a file, and much of their time is waiting. tests/conftest.py
# has their order.
"$VENV_PYTHON" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
