#!/usr/bin/env bash
# Packed documents: samples of several documents, which see nothing of each other. ALGORITHM chooses the algorithm. Example:
#   CP=2 MICRO_BATCH=2 ALGORITHM=ulysses_cp_algo bash tests_extend/system_tests/feature_tests/packed_documents.sh
set -euo pipefail
FLAGS="--reset-position-ids --reset-attention-mask --eod-mask-loss ${FLAGS:-}"
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature packed_documents --context-parallel-algo "${ALGORITHM:-megatron_cp_algo}"
