#!/usr/bin/env bash
# Double ring: inner rings of CP_WINDOW_SIZE ranks, and K/V blocks that cross between them once an inner ring. Example:
#   CP=8 CP_WINDOW_SIZE=4 bash tests_extend/system_tests/feature_tests/double_ring.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature double_ring --context-parallel-algo megatron_cp_algo --cp-window-size "${CP_WINDOW_SIZE:-2}" \
    --use-cp-send-recv-overlap
