# Sourced by the other scripts: makes the virtual environment where it is not there or not up to date, and sets $PYTHON.
#
#   PYTHON_FOR_VENV   the CPython to make it with; else one is looked for
#   PYTHON_VERSIONS   which versions will do, the preferred first (3.12)
#   VENV              where to make it, .venv in the repository by default
#   CONSTRAINTS       pip's constraints (scripts/constraints.txt)
#   EXTRAS            the project's extras to install (megatron,plots,tests)
#
# torch comes from the index that pip is configured for: `PIP_INDEX_URL` and `PIP_EXTRA_INDEX_URL` choose another build.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$repository/.venv}
CONSTRAINTS=${CONSTRAINTS:-$repository/scripts/constraints.txt}
EXTRAS=${EXTRAS:-megatron,plots,tests}
read -r -a needed <<<"${PYTHON_VERSIONS:-3.12}"

# is_python VERSION COMMAND: whether the command is a Python of this version.
is_python() {
    command -v "$2" >/dev/null 2>&1 &&
        [[ $("$2" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$1" ]]
}

find_python() {
    local version candidates candidate looked_for=()
    for version in "${needed[@]}"; do
        candidates=("python$version" python3 python)
        shopt -s nullglob
        candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python)
        candidates+=("$HOME"/.local/share/uv/python/cpython-"$version"*/bin/python"$version")
        candidates+=(/usr/local/bin/python"$version" /opt/homebrew/bin/python"$version" /opt/python*/bin/python"$version")
        shopt -u nullglob
        if [[ -n ${PYTHON_FOR_VENV:-} ]]; then
            candidates=("$PYTHON_FOR_VENV")
        fi
        for candidate in "${candidates[@]}"; do
            if is_python "$version" "$candidate"; then
                command -v "$candidate"
                return
            fi
        done
        looked_for+=("${candidates[@]}")
    done
    {
        echo "error: CPython ${needed[*]} is needed, and none was found."
        echo "looked for: ${looked_for[*]}"
        echo "install it, or name it: PYTHON_FOR_VENV=/path/to/python${needed[0]} bash $0"
    } >&2
    return 1
}

make_environment() {
    local python stamp
    stamp=$({ cat "$repository"/{pyproject.toml,setup.py} "$CONSTRAINTS" && echo "$EXTRAS"; } | cksum)
    if [[ ! -f $VENV/complete || $(<"$VENV/complete") != "$stamp" ]]; then
        python=$(find_python) || return 1
        echo "making the environment $VENV with $("$python" --version) (torch and Megatron; some minutes the first time)"
        # Each step says itself that it failed: within `make_environment ||`, bash ignores `set -e`.
        "$python" -m venv "$VENV" || return 1
        # The patches are installed as a link to this checkout, so that an edit is seen at once.
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$CONSTRAINTS" --editable "$repository[$EXTRAS]" || {
            echo "error: the environment $VENV is not complete: pip could not install the project into it, see above." \
                "It takes about 6 GB of disk, and 3 GB of ${TMPDIR:-/tmp} while it is made" >&2
            return 1
        }
        echo "$stamp" >"$VENV/complete"
    fi
}

make_environment || exit 1
PYTHON=$VENV/bin/python
