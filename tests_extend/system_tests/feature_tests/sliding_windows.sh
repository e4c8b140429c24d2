#!/usr/bin/env bash
# Sliding windows of WINDOW tokens, in all layers but every EVERY-th. ALGORITHM chooses the algorithm. Example:
#   CP=4 WINDOW=64 EVERY=6 LAYERS=6 bash tests_extend/system_tests/feature_tests/sliding_windows.sh
set -euo pipefail
FLAGS="--window-size $((${WINDOW:-32} - 1)),0 --window-attn-skip-freq ${EVERY:-2} ${FLAGS:-}"
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature sliding_windows --context-parallel-algo "${ALGORITHM:-megatron_cp_algo}"
