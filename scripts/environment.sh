# Sourced by the other scripts: makes the virtual environment where it is not there or not up to date, and sets $PYTHON.
#
#   PYTHON_FOR_VENV   the CPython 3.12 to make it with; else one is looked for
#   VENV              where to make it, .venv in the repository by default
#
# torch comes from the index that pip is configured for: `PIP_INDEX_URL` and `PIP_EXTRA_INDEX_URL` choose another build.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$repository/.venv}
needed=3.12

is_needed_python() {
    command -v "$1" >/dev/null 2>&1 &&
        [[ $("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$needed" ]]
}

find_python() {
    local candidates=("python$needed" python3 python) candidate
    shopt -s nullglob
    candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$needed"*/bin/python)
    candidates+=("$HOME"/.local/share/uv/python/cpython-"$needed"*/bin/python"$needed")
    candidates+=(/usr/local/bin/python"$needed" /opt/homebrew/bin/python"$needed" /opt/python*/bin/python"$needed")
    shopt -u nullglob
    if [[ -n ${PYTHON_FOR_VENV:-} ]]; then
        candidates=("$PYTHON_FOR_VENV")
    fi
    for candidate in "${candidates[@]}"; do
        if is_needed_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    {
        echo "error: CPython $needed is needed (megatron-core 0.17 and later ship megatron.training for it), and none was found."
        echo "looked for: ${candidates[*]}"
        echo "install it, or name it: PYTHON_FOR_VENV=/path/to/python$needed bash $0"
    } >&2
    return 1
}

make_environment() {
    local python stamp
    stamp=$(cat "$repository"/{pyproject.toml,setup.py,scripts/constraints.txt} | cksum)
    if [[ ! -f $VENV/complete || $(<"$VENV/complete") != "$stamp" ]]; then
        python=$(find_python) || return 1
        echo "making the environment $VENV with $("$python" --version) (torch and Megatron; some minutes the first time)"
        "$python" -m venv "$VENV"
        # The patches are installed as a link to this checkout, so that an edit is seen at once.
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$repository/scripts/constraints.txt" --editable "$repository[megatron,plots,tests]"
        echo "$stamp" >"$VENV/complete"
    fi
}

make_environment || exit 1
PYTHON=$VENV/bin/python
