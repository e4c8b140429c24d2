"""What changes no result: fused operators, overlap, memory, profiling, fault recovery; and what only seems to.

Source: Ascend/MindSpeed, mindspeed/features_manager and docs/zh/features; mindspeed/arguments.py of its older branches.
"""

from mindspeed_cp.patches.mindspeed.record import CommandLine, Disposition, Record, Ruling, noted, refused


def _optimizer(value: str, line: CommandLine) -> Ruling:
    if value == "fused_ema_adamw":
        return Ruling(Disposition.REFUSED, "Megatron keeps no running average of the weights; use --optimizer adam")
    return Ruling(Disposition.NOTED, "the same functions")


def _layer_list(value: str, line: CommandLine) -> Ruling:
    """The embedding is in the first stage and the loss in the last, there and here."""
    layers = value.split(",")
    if not all(each.isdecimal() and int(each) for each in layers):
        return Ruling(Disposition.REFUSED, "it is a list of numbers of layers; give it as 4,4,3")
    stages = line.whole("--pipeline-model-parallel-size", 1)
    if len(layers) != stages:
        return Ruling(
            Disposition.REFUSED,
            f"it needs a number of layers for each of --pipeline-model-parallel-size {stages}; give them all",
        )
    if sum(map(int, layers)) != line.whole("--num-layers"):
        return Ruling(
            Disposition.REFUSED, f"its sum is not --num-layers {line.text('--num-layers', '')}; give them all"
        )
    beside = ["--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"]
    is_even = len({*map(int, layers)}) == 1
    if not is_even:
        beside.append("--mtp-num-layers")
    if present := [name for name in beside if line.has(name)]:
        return Ruling(Disposition.REFUSED, f"with {present[0]} stages hold more; use --pipeline-model-parallel-layout")
    if is_even:
        return Ruling(Disposition.NOTED, "all stages hold as many layers, as Megatron has it")
    layout = "|".join(f"t*{number}" for number in layers)
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's --pipeline-model-parallel-layout",
        ("--pipeline-model-parallel-layout", f"E{layout}L"),
    )


OPERATORS = (
    *noted(
        "fused operators",
        "the same functions",
        """
        --use-fused-rmsnorm
        --use-fused-swiglu
        --use-fused-rotary-pos-emb
        --use-fused-mlp
        --use-fused-moe-token-permute-and-unpermute
        --gemm-gradient-accumulation-fusion
        --mla-mm-split
        --enable-mla-absorb
        --jit-compile
        --optimization-level N
        --te-gmm-mode {performance,compatible}
        --mlp-layer-fusion
        --use-triton-swiglu-limit
        --use-naive-l2norm
        """,
    ),
    *noted(
        "reproducible operators",
        "the same functions; --deterministic-mode is Megatron's",
        """
        --npu-deterministic
        --use-deter-comp
        --use-batch-invariant-ops
        --use-flash-attn-npu-batch-invariant
        """,
    ),
    *noted(
        "overlap of communication and computation, and order of communication",
        "the same results",
        """
        --use-ascend-mc2
        --use-mc2
        --use-ascend-coc
        --coc-mode N
        --coc-parallel-num N
        --coc-fused-kernel
        --comm-overlap-type S
        --enable-overlap-ag-with-matmul
        --enable-overlap-matmul-with-rs
        --enable-backward-overlap-ag-with-matmul
        --mla-up-proj-tp-overlap
        --ampipe-degree N
        --ampipe-tp-sp-comm-overlap
        --use-nanopipe
        --use-nanopipe-swap
        --dualpipev-dw-detach
        --schedules-method {dualpipev,chimera}
        --chimera-decouple-bw
        --virtual-data-parallel-size N
        --foldx-mode {aiao,fifo}
        --optimize-send-recv-comm
        --optimize-vpp-send-recv-comm
        --overlap-warmup-cooldown-communication
        --use-multi-stream
        --async-log-allreduce
        --reset-bucket-group-order
        --ddp-bucket-optimization
        --disable-gloo-group
        --hccl-slice-size N
        --hccl-group-buffer S
        --hccl-group-buffer-adaptive
        --hccl-ep-group-buffer-adaptive-factor X
        --hccl-op-mode S
        --aiqos
        --aiqos-enable-roce
        --aiqos-mode S
        --aiqos-schedule S
        --optimize-recomp-communication-level N
        --optimize-recomp-communication-status N
        """,
    ),
    *noted(
        "overlap in mixtures of experts",
        "the same results",
        """
        --moe-permutation-async-comm
        --moe-allgather-overlap-comm
        --moe-alltoall-overlap-comm
        --moe-alltoall-mc2
        --moe-bmm-mc2
        --moe-fb-overlap
        --moe-hierarchical-alltoallv
        --moe-experts-pipeline-degree N
        --use-pipe-experts
        --pipe-experts-multi-data N
        --pipe-experts-multi-stream
        --moe-tp-extend-ep
        --enable-token-rearrange-opt
        --balanced-moe-experts
        --balanced-moe-hot-expert-num N
        --trans-hot-expert-group-num N
        --enable-expert-placement
        --enable-fine-grained-expert-placement
        --expert-placement-freq N
        --fine-grained-expert-placement-thre X
        --print-expert-load
        """,
    ),
    *noted(
        "memory: recomputation",
        "the same results; --recompute-granularity is Megatron's",
        """
        --recompute-activation-function
        --recompute-activation-function-num-layers N
        --recompute-norm
        --recompute-norm-num-layers N
        --recompute-in-advance
        --recompute-in-bubble
        --recompute-mla-up-proj
        --recompute-mtp-layer
        --recompute-mtp-norm
        --recompute-type N
        --recompute-module-list S
        --enable-recompute-layers-per-pp-rank
        --adaptive-recompute-device-size N
        --adaptive-recompute-device-swap
        --adaptive-recompute-profiling-step N
        --moe-adaptive-recompute-activation
        --moe-adaptive-recompute-activation-scale X
        --moe-zero-memory {disable,level0,level1}
        --moe-zero-memory-num-layers N
        --mla-zero-memory
        """,
    ),
    *noted(
        "memory: what is kept where",
        "the same results",
        """
        --reuse-fp32-param
        --swap-attention
        --swap-modules S
        --swap-models S
        --swap-layer-input
        --swap-optimizer
        --swap-optimizer-times N
        --prefetch
        --smart-swap
        --virtual-optimizer S...
        --adaptive-memory-optimization
        --memory-fragmentation
        --mla-swap-core-attn-out
        --moe-unperm2-mem-optim
        --moe-unperm2-mem-optim-swap
        --moe-zerc
        --mtp-mem-efficient-logits
        --loss-compute-mode {default,chunk}
        --loss-chunk-size N
        --output-layer-slice-num N
        --compress-activation S
        --compress-optimizer
        --compress-dense {disable,level0,level1}
        --param-and-grad-buffer-pad N
        --layerzero
        --layerzero-config S
        --enable-zero3
        --enable-share-memory
        --fp8-reuse-quantized-weight
        --key-sizes-cache
        """,
    ),
    *noted(
        "how linear layers are split over tensor-parallel ranks",
        "the same results; they are split as Megatron does",
        """
        --tp-2d
        --tp-x N
        --tp-y N
        --use-nd-matmul
        --nd1-dim1-size N
        --nd2-dim1-size N
        --unaligned-linear
        """,
    ),
    *noted(
        "profiles, dumps and reports",
        "the same results; --profile is Megatron's",
        """
        --profile-level {level_none,level0,level1,level2}
        --profile-with-cpu
        --profile-with-stack
        --profile-with-memory
        --profile-record-shapes
        --profile-save-path S
        --profile-export-type {text,db}
        --profile-data-simplification
        --profile-memory
        --profile-operator
        --prof-file S
        --npu-datadump
        --op-cal-tflops
        --te-comparison-with-cpu
        --te-comparison-with-bf16
        --use-wandb
        """,
    ),
    *noted(
        "recovery from faults, and storage",
        "not there; results are the same",
        """
        --enable-high-availability
        --enable-hbmfault-repair
        --enable-worker-reboot
        --enable-elastic-training
        --enable-optimizer-state-local-copy
        --distributed-optimizer-no-replica
        --ttp-enabled
        --ttp-dump-dir S
        --ttp-dump-timeout-seconds N
        --ttp-heartbeat-interval-ms N
        --ttp-heartbeat-timeout-ms N
        --ttp-max-dump-ckpt-to-keep N
        --ttp-max-missed-count N
        --ttp-save-optimizer
        --ttp-save-rng
        --ttp-server-ip S
        --ttp-server-port N
        --ttp-wait-dump-file-timeout N
        --no-shared-storage
        --md5-validate
        """,
    ),
    *noted(
        "which framework runs it",
        "PyTorch",
        """
        --ai-framework {pytorch,mindspore}
        --additional-config S
        """,
    ),
    *noted(
        "for models that pass several tensors from stage to stage",
        "Megatron's pass one",
        "--use-multiparameter-pipeline-model-parallel",
    ),
    *refused(
        "a search for parallel sizes in place of training",
        "it does not train; leave it out",
        """
        --auto-parallel
        --auto-parallel-mm
        --auto-parallel-profile
        --auto-settings
        --auto-tuning
        --automated-pipeline
        --automated-pipeline-perf
        """,
    ),
    *noted(
        "numbers of such a search",
        "it belongs to a search for parallel sizes",
        """
        --auto-settings-log-level S
        --auto-settings-ranks N
        --auto-settings-type S
        --auto-settings-work-dir S
        --auto-tuning-log-level {debug,info,warning}
        --auto-tuning-ranks N
        --auto-tuning-work-dir S
        --auto-tuning-database-address S
        --auto-tuning-database-port N
        --save-memory-ratio X
        --mbs-idx N
        --optimized-mbs-list S
        --optimized-mbs-mode
        --pp-schedule-list S
        --search-algo S
        --target-nnodes N
        --work-dir S
        --nnodes S
        --nproc-per-node S
        --node-rank N
        --master-addr S
        --master-port N
        --nproc_per_node S
        --node_rank N
        --master_addr S
        --master_port N
        """,
    ),
    *refused(
        "training split into parts of different sizes or places",
        "Megatron does not have it; leave it out",
        """
        --dist-train
        --layerwise-disaggregated-training
        --fsdp2-config-path S
        """,
    ),
    Record(
        "--num-layer-list",
        "S",
        "layers of each pipeline stage",
        Disposition.TRANSLATED,
        "--pipeline-model-parallel-layout; noted where all are as many; refused with virtual stages, MTP, or "
        "another number of stages or layers",
        _layer_list,
    ),
    *refused(
        "layers of each pipeline stage",
        "Megatron spells it otherwise; use --pipeline-model-parallel-layout",
        "--pipeline-num-transformer-layers S",
    ),
    *refused(
        "layers that do nothing",
        "Megatron counts real layers; lower --num-layers, and place them by --pipeline-model-parallel-layout",
        "--noop-layers S",
    ),
    *refused(
        "states, gradients or weights in fewer bits",
        "Megatron does not have these; leave it out",
        """
        --quant-states {fp8,hif8,mxfp8}
        --quant-grads
        --o2-optimizer
        --o2-gradient
        --qat-scheme S
        --qat-quant-block-size N
        --no-use-gmm-fp8
        --scale-fmt S
        --enable-autocast
        """,
    ),
    *noted("its type", "it belongs to --enable-autocast, which is refused", "--autocast-dtype {bfloat16,float16}"),
    Record(
        "--optimizer-selection",
        "{fused_adamw,fused_torch_adamw,fused_ema_adamw}",
        "which operator updates the weights",
        Disposition.NOTED,
        "the same functions; fused_ema_adamw refused, Megatron keeps no running average of the weights",
        _optimizer,
    ),
    *refused(
        "a running average of the weights",
        "Megatron keeps none; leave it out",
        """
        --use-ema
        --ema-decay X
        """,
    ),
    *refused(
        "distillation from a teacher of more bits",
        "Megatron does not have it; leave it out",
        """
        --qad-enable
        --qad-teacher-load S
        """,
    ),
    *noted(
        "numbers of that distillation",
        "it belongs to --qad-enable, which is refused",
        """
        --no-qad-enable
        --kl-loss-reduction {mean,sum}
        --kl-loss-weight X
        --kl-temperature X
        """,
    ),
)
