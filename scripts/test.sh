#!/usr/bin/env bash
# Check the style and run the tests; makes the environment if it is not there.
#
#   bash scripts/test.sh                     # what everyone runs before a commit: some minutes on 2 cores
#   bash scripts/test.sh --all               # the slow tests too
#   bash scripts/test.sh -k ulysses -x       # other arguments go to pytest
#   bash scripts/test.sh -n 0 --pdb          # in one process, as a debugger needs it
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
# Unit and system tests side by side: most tests are one process, and the ranks of others wait for each other. More than
# four workers would import torch more often than they gain.
workers=(-n auto --maxprocesses 4 --dist loadgroup)
OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${workers[@]}" "${pytest_arguments[@]}"
