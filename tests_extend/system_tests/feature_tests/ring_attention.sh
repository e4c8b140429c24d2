#!/usr/bin/env bash
# Ring attention: K/V blocks travel around all ranks. CP_WINDOW_SIZE above 1 makes it a double ring. Example:
#   CP=4 CP_WINDOW_SIZE=2 bash tests_extend/system_tests/feature_tests/ring_attention.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature ring_attention --context-parallel-algo megatron_cp_algo --cp-window-size "${CP_WINDOW_SIZE:-1}" \
    --use-cp-send-recv-overlap
