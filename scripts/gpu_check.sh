#!/usr/bin/env bash
# Everything that only a GPU can say, in one call of less than eight minutes: tests/gpu, and a table of figures.
#
#   scripts/gpu_check.sh --pack [FOLDER] [--python-version 3.12] [--platform manylinux_2_28_x86_64 ...]
#   scripts/gpu_check.sh [FOLDER]
#
# The first puts the wheels that the second needs beside torch into FOLDER (default: gpu_wheels of this checkout), at
# most 60 MB; it takes this checkout's environment and an index. The second takes one GPU, a Python with torch (PYTHON,
# default: python3) and FOLDER, and no network; it changes nothing of that Python. Without a GPU it says so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

if [[ "${1:-}" == --pack ]]; then
    shift
    folder="$ROOT/gpu_wheels"
    if [[ $# -gt 0 && "$1" != --* ]]; then
        folder="$1"
        shift
    fi
    setup_env dev
    exec "$VENV_PYTHON" "$ROOT/scripts/pack_wheels.py" "$folder" "$@"
fi

folder="${1:-$ROOT/gpu_wheels}"
if ! has_gpu; then
    echo "No NVIDIA GPU was found here: nothing was checked."
    exit 0
fi
python="$(find_python)"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "$python has no torch that sees the GPU: install PyTorch with CUDA, or name a Python that has it in PYTHON." >&2
    exit 1
fi
if ! compgen -G "$folder/*.whl" >/dev/null; then
    echo "$folder has no wheels: fill it with scripts/gpu_check.sh --pack on a machine with an index." >&2
    exit 1
fi
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" "$folder"/*.whl
export PYTHONPATH="$ROOT:$site:$ROOT/scripts/bench/stand_ins" PYTHONDONTWRITEBYTECODE=1
cd "$ROOT"
"$python" scripts/bench/gpu_check.py
