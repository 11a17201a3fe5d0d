#!/usr/bin/env bash
# The only entry point: finds or creates the Python environment, then hands over to lsdc_utils/pipeline (see --help).
set -euo pipefail
unset CDPATH # with which cd may go elsewhere
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
case $root in *:* | *$'\n'*) echo "run_all.sh: $root: Python needs a folder without a colon or line break in its name" >&2 && exit 1 ;; esac
pwd -P >/dev/null 2>&1 || cd -- "$root" # the working folder is gone

# Nothing of the user's Python, matplotlib and Jupyter reaches a run, but folders in LSDC_PYTHONPATH; `lab` has his Jupyter.
for name in ${!PYTHON@} MPLBACKEND MATPLOTLIBRC JUPYTER_PATH JUPYTER_CONFIG_PATH JUPYTER_RUNTIME_DIR; do
    case $name in PYTHONNOUSERSITE | PYTHONUSERBASE | PYTHONDONTWRITEBYTECODE | PYTHONPYCACHEPREFIX) ;; *) unset "$name" ;; esac
done
export PYTHONPATH="$root${LSDC_PYTHONPATH:+:$LSDC_PYTHONPATH}" PYTHONUTF8=1 # names of files in any encoding, under any LANG
export JUPYTER_PREFER_ENV_PATH=1 LOGNAME=${LOGNAME:-$(id -un 2>/dev/null || echo "user$UID")} # a user in a container has no name
TMPDIR=${TMPDIR:-/tmp}
if [ ${#TMPDIR} -gt 60 ]; then # the path of a socket in it may have 107 bytes
    short=/tmp/lsdc_utils_$UID-$(cksum <<<"$TMPDIR" | tr -dc 0-9)
    ln -sfn -- "$TMPDIR" "$short" && export TMPDIR=$short
fi
cache=$TMPDIR/lsdc_utils_$UID home=yes
mkdir -p -- "${HOME:-/dev/null}/.cache" 2>/dev/null && [ -w "$HOME/.cache" ] || home=no # none, or not one of ours
[ -d "${HOME:-}" ] || export HOME=$cache
[ $home = yes ] || export XDG_CACHE_HOME=$cache/cache
if [ $home = no ] || [ "${1:-}" != lab ]; then
    export MPLCONFIGDIR=$cache/matplotlib IPYTHONDIR=$cache/ipython
    export JUPYTER_DATA_DIR=$cache/jupyter JUPYTER_CONFIG_DIR=$cache/jupyter/config
fi

find_python() { # the first Python on PATH that is 3.$1 or later
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $1))" 2>/dev/null && echo "$candidate" && return
    done
    return 1
}

satisfies_pins() { # does this Python have every pinned package in its version?
    [ -n "$1" ] && "$1" - "$root/requirements.txt" <<'PYTHON' 2>/dev/null
import re, sys
from importlib.metadata import version  # of torch it is e.g. 2.14.1+cpu; a missing package raises

pins = re.findall(r"^([\w.-]+)==(\S+)$", open(sys.argv[1]).read(), re.M)
sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins))
PYTHON
}

pip_install() { # shows a line per package, and how many there are; all that pip says is in the log
    local line number=0 log=$root/.venv/setup.log
    env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT PIP_USER=0 \
        "$root/.venv/bin/python" -m pip install --progress-bar off "$@" 2>&1 | tee "$log" | while IFS= read -r line; do
        case $line in
        Collecting\ *) echo "  [$((++number)) of about $pins] ${line%% (*}" ;;
        *Downloading\ *MB\)*) echo "          ${line#"${line%%[! ]*}"}" ;;
        Installing\ *) echo "  Installing $pins packages; this can take half of the time" ;;
        esac
    done >&2 || {
        echo "run_all.sh: pip could not install the packages; last lines of $log:" >&2
        grep -v 'is ignored' "$log" | tail -n 15 | sed 's/^/      /' >&2
        return 1
    }
}

make_environment() {
    local base pins
    base=$(find_python 11) || { echo "run_all.sh: Python 3.11 or later is needed, and is not on PATH" >&2 && return 1; }
    pins=$(grep -c == "$root/requirements.txt")
    echo "Creating .venv: downloading and installing about $pins packages (2 to 10 minutes, 7 GB on disk)" >&2
    "$root/.venv/bin/python" -c '' 2>/dev/null || rm -rf -- "$root/.venv" # of a Python that is gone
    "$base" -m venv "$root/.venv" >&2 || {
        echo "run_all.sh: could not create .venv; on Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    }
    pip_install --requirement "$root/requirements.txt"
    "$root/.venv/bin/python" -c 'import cv2' 2>/dev/null || # on machines without libGL: the same cv2, without windows
        pip_install --force-reinstall --no-deps "$(sed -n 's/^opencv-python==/opencv-python-headless==/p' "$root/requirements.txt")"
    echo "Environment ready after $((SECONDS / 60)) min $((SECONDS % 60)) s" >&2
}

if any=$(find_python 8); then # --help and usage errors come before any set-up
    status=0
    "$any" -S -m lsdc_utils.pipeline.arguments "$@" || status=$?
    case $status in 0 | 2) exit "$status" ;; esac
elif [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    echo "usage: ./run_all.sh [COMMAND] [--profile P] [--data DIR] [--run NAME] [KEY=VALUE ...]   (see README.md)"
    exit
fi
python=$(command -v python || command -v python3 || true) # of the active environment, conda or venv
if ! satisfies_pins "$python"; then
    python="$root/.venv/bin/python"
    satisfies_pins "$python" || make_environment
fi
exec "$python" -m lsdc_utils.pipeline.commands "$@"
