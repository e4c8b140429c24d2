#!/usr/bin/env bash
# Ulysses: each rank computes all tokens for a part of the heads. Example, from a Megatron-LM checkout or from here:
#   CP=2 SEQ_LENGTH=1024 bash tests_extend/system_tests/feature_tests/ulysses.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

run_feature ulysses --context-parallel-algo ulysses_cp_algo
