#!/usr/bin/env bash
# The only entry point: finds or makes the Python environment, then hands over to lsdc_utils/pipeline/runner.py (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
headless=opencv-python-headless # the same cv2, for machines without the libraries of a desktop (libGL)

# Does this Python have every pinned package at its pinned version?
satisfies_pins() {
    [ -n "$1" ] && "$1" - "$root/requirements.txt" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1]):
    name, _, pinned = line.strip().partition("==")
    if pinned and not name.startswith("#"):
        try:
            installed = version(name).split("+")[0]  # torch says e.g. 2.14.1+cpu
        except PackageNotFoundError:
            sys.exit(1)
        if installed != pinned:
            sys.exit(1)
PYTHON
}

find_python() { # a Python >= 3.11 to make an environment with
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "run_all.sh: Python 3.11 or later is needed and was not found on PATH" >&2
    return 1
}

make_environment() {
    local base
    base=$(find_python)
    echo "Setting up .venv from requirements.txt with $("$base" --version); once, and it takes some minutes ..." >&2
    "$base" -m venv "$root/.venv" >&2 || {
        echo "run_all.sh: could not make .venv; on Debian: apt install python3-venv" >&2
        return 1
    }
    "$root/.venv/bin/python" -m pip install --quiet --requirement "$root/requirements.txt" >&2
    "$root/.venv/bin/python" -c 'import cv2' 2>/dev/null || {
        "$root/.venv/bin/python" -m pip install --quiet --force-reinstall --no-deps \
            "$headless==$(sed -n 's/^opencv-python==//p' "$root/requirements.txt")" >&2
    }
}

python=$(command -v python || command -v python3 || true) # of the environment that is active, conda or venv
if ! satisfies_pins "$python"; then
    python="$root/.venv/bin/python"
    satisfies_pins "$python" || make_environment
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m lsdc_utils.pipeline.runner "$@"
