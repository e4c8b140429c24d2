# Sourced by the feature scripts: trains a small GPT with a feature and with CP = 1, and compares the loss curves.
#
# Runs from a Megatron-LM checkout into which tests_extend was copied, and from this repository as it is. Everything comes
# from the environment; the defaults pass on a machine with 2 cores and no accelerator:
#
#   CP, TP, PP        context-, tensor- and pipeline-parallel size (4, 1, 1)
#   NPROC             ranks (CP * TP * PP)
#   TRAIN_SCRIPT      the training script (pretrain_gpt.py of the working directory, else scripts/pretrain_gpt.py here)
#   DATA_PATH         an indexed data set without .bin, one token a byte (random mock data where it is empty)
#   LAYERS HIDDEN HEADS QUERY_GROUPS SEQ_LENGTH MICRO_BATCH GLOBAL_BATCH ITERS LEARNING_RATE   sizes
#   TOLERANCE         largest relative difference of the losses (1e-5)
#   BACKEND           torch.distributed's backend (nccl where there is a GPU, hccl where there is an NPU, else gloo)
#   OUTPUT            folder of the logs (runs/<feature>)
#   PYTHON            the Python to run (this repository's .venv, else python3)
#   FLAGS             further flags for both runs; with --profile --use-pytorch-profiler traces are in $OUTPUT/*/torch_profile

feature_tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$feature_tests/../../.." && pwd)

CP=${CP:-4} TP=${TP:-1} PP=${PP:-1}
NPROC=${NPROC:-$((CP * TP * PP))}
LAYERS=${LAYERS:-2} HIDDEN=${HIDDEN:-64} HEADS=${HEADS:-8} QUERY_GROUPS=${QUERY_GROUPS:-}
SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH=${MICRO_BATCH:-1} GLOBAL_BATCH=${GLOBAL_BATCH:-2}
ITERS=${ITERS:-20} LEARNING_RATE=${LEARNING_RATE:-1e-3} TOLERANCE=${TOLERANCE:-1e-5}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$repository/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
if [[ -z ${TRAIN_SCRIPT:-} ]]; then
    TRAIN_SCRIPT=pretrain_gpt.py
    [[ -f $TRAIN_SCRIPT ]] || TRAIN_SCRIPT=$repository/scripts/pretrain_gpt.py
fi
toy_flags=$("$PYTHON" -m mindspeed_cp.testing.toy_flags) || {
    echo "error: $PYTHON cannot import mindspeed_cp; install it there, or set PYTHON." >&2
    exit 1
}
if [[ -z ${BACKEND:-} ]]; then
    BACKEND=$("$PYTHON" -c 'from mindspeed_cp.device import accelerator
print({"cuda": "nccl", "npu": "hccl", None: "gloo"}[accelerator()])')
fi

# What both runs share.
mapfile -t model_flags <<<"$toy_flags"
model_flags+=(
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS"
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$ITERS"
    --lr "$LEARNING_RATE"
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --distributed-backend "$BACKEND"
)
if [[ -n $QUERY_GROUPS ]]; then
    model_flags+=(--group-query-attention --num-query-groups "$QUERY_GROUPS")
fi
if [[ -n ${DATA_PATH:-} ]]; then
    model_flags+=(--data-path "$DATA_PATH")
else
    model_flags+=(--mock-data)
fi
read -r -a further_flags <<<"${FLAGS:-}"

# train NAME RANKS FLAG...: one training run, its output in $OUTPUT/NAME.log.
train() {
    local name=$1 ranks=$2 log=$OUTPUT/$1.log
    shift 2
    local command=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m mindspeed_cp "$TRAIN_SCRIPT"
        "${model_flags[@]}" "${further_flags[@]}" "$@")
    # Megatron names a trace by its rank alone: those of the two runs need folders of their own.
    if [[ " ${further_flags[*]} " == *" --profile "* ]]; then
        command+=(--tensorboard-dir "$OUTPUT/$name/tensorboard")
    fi
    mkdir -p "$OUTPUT"
    echo "$name: training on $ranks ranks, $ITERS iterations"
    local start=$SECONDS
    if ! CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 \
        "${command[@]}" >"$log" 2>&1; then
        report_failure "$name: training failed" "$log" "${command[@]}"
    fi
    echo "$name: trained in $((SECONDS - start)) s, log in $log"
}

# report_failure MESSAGE LOG COMMAND...: say what was run and how its output ended, and stop.
report_failure() {
    local message=$1 log=$2
    shift 2
    {
        echo "$message"
        printf 'command:'
        printf ' %q' "$@"
        printf '\nlast lines of %s:\n' "$log"
        # The ranks' own last words stand before the long ones of torch's launcher.
        sed '/torch\/distributed\/elastic/,$d' "$log" | tail -n 30
    } >&2
    exit 1
}

# run_feature NAME FLAG...: train with the flags and CP ranks, then without CP, and compare.
run_feature() {
    local name=$1
    shift
    OUTPUT=${OUTPUT:-runs/$name}
    train "$name-cp$CP" "$NPROC" --context-parallel-size "$CP" "$@"
    train "$name-cp1" "$((NPROC / CP))"
    local compare=("$PYTHON" "$feature_tests/../compare_losses.py" "$OUTPUT/$name-cp1.log" "$OUTPUT/$name-cp$CP.log"
        --names "CP 1" "CP $CP $name" --tolerance "$TOLERANCE" ${PLOT:+--plot "$PLOT"})
    if ! "${compare[@]}"; then
        report_failure "$name: the losses differ from those of CP = 1" "$OUTPUT/$name-cp$CP.log" "${compare[@]}"
    fi
}
