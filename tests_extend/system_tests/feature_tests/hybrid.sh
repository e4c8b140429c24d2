#!/usr/bin/env bash
# Hybrid: Ulysses among ULYSSES_DEGREE neighbours, a ring across (a double ring with CP_WINDOW_SIZE above 1). Example:
#   CP=8 ULYSSES_DEGREE=4 bash tests_extend/system_tests/feature_tests/hybrid.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature hybrid --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp "${ULYSSES_DEGREE:-2}" \
    --cp-window-size "${CP_WINDOW_SIZE:-1}" --use-cp-send-recv-overlap
