#!/usr/bin/env bash
# Make .venv at the repository's root: torch, the package in place, the development tools, the
# default model. A stamp named for what it was made from makes a second run return at once.
set -euo pipefail
cd "$(dirname "$0")/.."

constraints=requirements/constraints.txt
venv=.venv
stamp="$venv/.installed-$(cat pyproject.toml "$constraints" requirements/install.sh | cksum | cut -d' ' -f1)"

# On a terminal pip shows its own progress; in a log it would only be noise.
quiet=-qq
if [ -t 2 ]; then quiet=--progress-bar=on; fi

say() { printf '[setup] %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "error: Python 3.11 or newer is needed (found: $(python3 --version 2>&1 || true)); install it or run 'make PYTHON=/path/to/python3.11'"
    exit 2
}

install_torch() {
    local pip=("$venv/bin/python" -m pip install "$quiet" -c "$constraints")
    # With a GPU, and off Linux, the package index's own build is the right one.
    if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then
        "${pip[@]}" torch==2.13.0
        return
    fi
    # Without one, the index's build brings several GB of CUDA libraries for nothing. "+cpu" never
    # does: first from wherever pip is configured to look, then from PyTorch's own index, and
    # only if neither has it the large one.
    "${pip[@]}" torch==2.13.0+cpu 2>/dev/null && return
    "${pip[@]}" --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu \
        2>/dev/null && return
    say "no CPU build of torch can be reached: taking the index's own build (large)"
    "${pip[@]}" torch==2.13.0
}

if [ -e "$stamp" ]; then
    exit 0
fi
if ! [ -x "$venv/bin/python" ]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        say "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
        exit 2
    }
fi
say "installing torch (1 of 3)"
install_torch
say "installing cartridges and its dependencies (2 of 3; a few minutes the first time)"
# DeepSpeed's CPU parts are compiled on first use where they are wanted, never at installation.
DS_BUILD_OPS=0 "$venv/bin/python" -m pip install "$quiet" -c "$constraints" -e '.[dev]'
say "fetching the default model (3 of 3)"
"$venv/bin/python" -m cartridges.models >/dev/null
rm -f "$venv"/.installed-*
touch "$stamp"
