#!/usr/bin/env bash
# Check the style and run the tests; makes the environment if it is not there.
#
#   bash scripts/test.sh                     # what everyone runs before a commit: under 10 minutes on 2 cores
#   bash scripts/test.sh --all               # the slow tests too
#   bash scripts/test.sh -k ulysses -x       # other arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"

pytest_arguments=()
for argument in "$@"; do
    if [[ $argument == --all ]]; then
        pytest_arguments+=(-m "slow or not slow")
    else
        pytest_arguments+=("$argument")
    fi
done

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${pytest_arguments[@]}"
