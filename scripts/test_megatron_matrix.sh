#!/usr/bin/env bash
# Test with every supported release of Megatron, each in an environment of its own, and print one table for all of them:
# patches, transformer layers of megatron.core, and pretraining with each algorithm. Under 30 minutes on 2 cores.
#
#   bash scripts/test_megatron_matrix.sh                   # all releases
#   bash scripts/test_megatron_matrix.sh 0.16.1 0.19.2     # some
#   MEGATRON_LM_0_16_1=/path/to/Megatron-LM bash scripts/test_megatron_matrix.sh 0.16.1
#
# With a checkout named like that all trainings run its own pretrain_gpt.py. It is the only training there is for 0.16.1,
# whose wheel holds megatron.core alone. Environments and results stay in .matrix/<release>.
#
#   MEGATRON_LM_NEWEST=/path/to/Megatron-LM bash scripts/test_megatron_matrix.sh newest
#
# takes the newest torch and Megatron that pip finds, made anew each time; with a checkout, such as one of Megatron's main
# branch, its megatron.core and megatron.training instead of the wheel's.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"

# The oldest runs on the oldest Python and torch that are supported.
declare -A pythons=([0.16.1]="3.10 3.11 3.12" [0.17.1]=3.12 [0.18.2]=3.12 [0.19.2]=3.12 [newest]=3.12)
declare -A torches=([0.16.1]=2.6.0 [0.17.1]=2.13.0 [0.18.2]=2.13.0 [0.19.2]=2.13.0)
releases=("$@")
if [[ ${#releases[@]} -eq 0 ]]; then
    releases=(0.16.1 0.17.1 0.18.2 0.19.2)
fi
for release in "${releases[@]}"; do
    [[ -n ${pythons[$release]:-} ]] || { echo "error: no release '$release'; there are: ${!pythons[*]}" >&2; exit 2; }
done

# test_release RELEASE: make its environment and run what concerns it, results in .matrix/RELEASE/*.xml.
test_release() {
    local folder=$repository/.matrix/$1 checkout=${1//./_} failures=0
    checkout=MEGATRON_LM_${checkout^^}
    mkdir -p "$folder"
    rm -f "$folder"/*.xml
    if [[ $1 == newest ]]; then
        rm -rf "$folder/venv"
        : >"$folder/constraints.txt"
    else
        printf 'megatron-core==%s\ntorch==%s\n' "$1" "${torches[$1]}" >"$folder/constraints.txt"
    fi
    VENV=$folder/venv CONSTRAINTS=$folder/constraints.txt EXTRAS=megatron,tests PYTHON_VERSIONS=${pythons[$1]}
    source scripts/environment.sh
    if [[ -n ${!checkout:-} ]]; then
        export MEGATRON_LM=${!checkout}
        if [[ $1 == newest ]]; then
            export PYTHONPATH=$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}
        fi
    else
        unset MEGATRON_LM
    fi
    "$PYTHON" -W ignore -c 'import torch, megatron.core as core; print("megatron.core", core.__version__, "torch", torch.__version__)'
    local pytest=("$PYTHON" -m pytest --quiet --disable-warnings -p no:cacheprovider)
    OMP_NUM_THREADS=1 "${pytest[@]}" --junitxml "$folder/patches.xml" tests_extend/unit_tests/patches || failures=1
    OMP_NUM_THREADS=1 "${pytest[@]}" --junitxml "$folder/system.xml" -m every_release tests_extend/system_tests || failures=1
    return "$failures"
}

failed=() folders=()
for release in "${releases[@]}"; do
    start=$SECONDS
    echo "Megatron $release"
    # In a process of its own: each release sets the variables of environment.sh anew. Errors end it, hence no `||`.
    set +e
    (
        set -e
        test_release "$release"
    )
    status=$?
    set -e
    [[ $status -eq 0 ]] || failed+=("$release")
    folders+=(".matrix/$release")
    echo "Megatron $release: $((SECONDS - start)) s"
done

"${folders[-1]}/venv/bin/python" tests_extend/system_tests/release_table.py "${folders[@]}"
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
