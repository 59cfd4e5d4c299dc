#!/usr/bin/env bash
# From a fresh clone to a language model trained with PPO: at most ten minutes on two CPU cores, no GPU needed.
#
#   scripts/quickstart.sh [--out DIR] [--devices N] [--seed N]
#
# With an NVIDIA GPU the same command uses it. Run again after an interruption, it continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

started=$SECONDS
setup_env examples
say "Environment ready after $((SECONDS - started)) s"

default_out=(--out "$ROOT/runs/quickstart")
for argument in "$@"; do
    [[ "$argument" == --out || "$argument" == --out=* ]] && default_out=()
done
PYTHONPATH="$ROOT/examples${PYTHONPATH:+:$PYTHONPATH}" \
    "$VENV_PYTHON" -m summarize_docstrings.run ${default_out[@]+"${default_out[@]}"} "$@"
say "Quickstart finished in $((SECONDS - started)) s"
