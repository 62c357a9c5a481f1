# Sourced: make .venv in the repository root if it is not there, install what $1 names, activate it.
# $1: extras of setup.py to install, such as "report" or "test".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(not sys.version_info >= (3, 11))' 2>/dev/null
        then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with venv and pip on the PATH" >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
stamp=".venv/installed-$1"
if [ ! -f "$stamp" ] || [ setup.py -nt "$stamp" ] || [ fewstep.py -nt "$stamp" ]; then
    echo "== installing Fewstep and what it needs into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]"
    touch "$stamp"
fi
# shellcheck disable=SC1091
. .venv/bin/activate
