#!/usr/bin/env bash
# From nothing to a picture: trains a small GPT on real text with context parallelism on four ranks of this machine, and
# once more without, and draws both loss curves. No accelerator needed. Under 5 minutes on 2 cores, installation apart.
#
#   bash scripts/quickstart.sh               # ulysses
#   ITERS=20 bash scripts/quickstart.sh      # sizes come from the environment, see feature_tests/launcher.sh
set -euo pipefail
usage="usage: [ITERS=n] [SEQ_LENGTH=n] bash scripts/quickstart.sh [feature], a feature of tests_extend/system_tests/feature_tests"
[[ $# -le 1 && ${1:-} != -* ]] || { echo "$usage" >&2; exit 2; }
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
feature=${1:-ulysses}
script=$repository/tests_extend/system_tests/feature_tests/$feature.sh
if [[ $feature == launcher || ! -f $script ]]; then
    available=$(cd "$(dirname "$script")" && ls -- *.sh | grep -v launcher | sed 's/\.sh$//' | tr '\n' ' ')
    echo "error: there is no feature '$feature'; available: $available" >&2
    exit 2
fi

source "$repository/scripts/environment.sh"
cd "$repository"
export PYTHON OUTPUT=runs/quickstart DATA_PATH=runs/quickstart/corpus PLOT=runs/quickstart/losses.png
export HIDDEN=${HIDDEN:-128} LAYERS=${LAYERS:-2} SEQ_LENGTH=${SEQ_LENGTH:-512} ITERS=${ITERS:-100}
if [[ ! -f $DATA_PATH.idx ]]; then
    echo "building the corpus from the source text of the installed packages"
    "$PYTHON" -W ignore scripts/build_corpus.py --output "$DATA_PATH" --max-megabytes 8 --suffix .py \
        -- "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
fi
bash "$script"
