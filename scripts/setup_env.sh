# Makes the virtual environment .venv of this checkout; sourced by quickstart.sh and test.sh, after `set -euo pipefail`.
#
#   setup_env EXTRAS     e.g. setup_env examples
#
# PYTHON names the interpreter to use (default: the first of python3, python that is 3.10 or newer). Without an NVIDIA
# GPU, the versions of constraints-cpu.txt are installed; with one, PyTorch as pip finds it. Wheels come from wherever
# pip is configured to look: where that offers PyTorch with CUDA only, a CPU machine downloads a few gigabytes for
# nothing, which PIP_EXTRA_INDEX_URL or pip.conf can change.
#
#   install_system_packages PACKAGE:FILE ...     e.g. install_system_packages 'postgresql:/usr/lib/postgresql/*/bin/initdb'
#
# Installs the Debian packages whose file (a pattern) is not there. Never fails: what needs them does without.
#
#   fetch_package NAME VERSION ...    e.g. fetch_package transformer_engine 2.11.0
#
# Puts a package without what it requires into .NAME/VERSION, beside the environment and not in it, for tests: Transformer
# Engine's Python, whose classes run on a CPU; TRL, which has the chat templates of many models.
#
# Defines ROOT (the checkout) and VENV_PYTHON (the interpreter of the environment).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

say() { printf '\n==> %s\n' "$*"; }

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_recent_python "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
        echo "PYTHON=$PYTHON is not a Python 3.10 or newer." >&2
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        is_recent_python "$candidate" && { printf '%s\n' "$candidate"; return; }
    done
    echo "No Python 3.10 or newer was found: install one, or name it in PYTHON." >&2
    return 1
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && [[ -n "$(nvidia-smi -L 2>/dev/null)" ]]; }

setup_env() {
    local extras="$1" python constraints kind stamp
    local -a options=()
    constraints="$ROOT/scripts/constraints-cpu.txt"
    if has_gpu; then
        kind=gpu
    else
        kind=cpu
        options=(-c "$constraints")
    fi
    # What was asked for last time; when nothing of it has changed, nothing is to be done.
    stamp="$kind $extras $(cat "$ROOT/pyproject.toml" "$constraints" | cksum)"
    if [[ -x "$VENV_PYTHON" && "$(cat "$VENV/.nemo_rlhf_$extras" 2>/dev/null)" == "$stamp" ]]; then
        say "Environment $VENV is up to date."
        return
    fi
    if [[ ! -x "$VENV_PYTHON" ]]; then
        python="$(find_python)"
        say "Making the environment $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    say "Installing nemo_rlhf[$extras] ($kind); this takes a minute or two"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check ${options[@]+"${options[@]}"} -e "$ROOT[$extras]"
    printf '%s\n' "$stamp" >"$VENV/.nemo_rlhf_$extras"
}

fetch_package() {
    local name="$1" version target
    for version in "${@:2}"; do
        target="$ROOT/.$name/$version"
        [[ -d "$target" ]] && continue
        say "Fetching $name $version (its Python alone)"
        rm -rf "$target.partial"
        "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target.partial" \
            "$name==$version"
        mv "$target.partial" "$target"
    done
}

install_system_packages() {
    local wanted log
    local -a missing=() as_root=()
    for wanted in "$@"; do
        compgen -G "${wanted#*:}" >/dev/null || missing+=("${wanted%%:*}")
    done
    [[ ${#missing[@]} -eq 0 ]] && return 0
    if [[ "$(id -u)" -ne 0 ]]; then
        as_root=(sudo -n)
    fi
    if ! command -v apt-get >/dev/null 2>&1 || ! ${as_root[@]+"${as_root[@]}"} true >/dev/null 2>&1; then
        say "Cannot install ${missing[*]} (that takes apt-get and root): tests that need them are skipped."
        return 0
    fi
    log="$(mktemp)"
    ${as_root[@]+"${as_root[@]}"} apt-get update -q >"$log" 2>&1 </dev/null || true
    for wanted in "${missing[@]}"; do
        if ! ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
            apt-get install -q -y --no-install-recommends "$wanted" >"$log" 2>&1 </dev/null; then
            say "Could not install $wanted: tests that need it are skipped."
            tail -n 3 "$log"
        fi
    done
    rm -f "$log"
}
