"""Tokenizers and data, and what belongs to other programs than pretraining: tuning, generation, evaluation, conversion.

Source: Ascend/MindSpeed-LLM, mindspeed_llm/features_manager/{tokenizer,dataset,finetune,dpo,inference,evaluation,
convert_checkpoint} and training/{arguments,tokenizer}; modellink/arguments.py of its older branches.
"""

from mindspeed_cp.patches.mindspeed.record import CommandLine, Disposition, Record, Ruling, noted, records, refused

_NAME = "--tokenizer-name-or-path"


def _pretrained(value: str, line: CommandLine) -> Ruling:
    """Both ask Hugging Face's AutoTokenizer, count its whole vocabulary, and end documents with its end of sequence."""
    name = line.text(_NAME)
    if name is None:
        return Ruling(Disposition.REFUSED, f"it needs {_NAME}; give it")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name, "--trust-remote-code")
    return Ruling(
        Disposition.TRANSLATED,
        "HuggingFaceTokenizer, with --tokenizer-model and --trust-remote-code",
        flags,
        (_NAME, "--trust-remote-code"),
    )


PROGRAMS_OF_MINDSPEED = {
    "posttrain_gpt.py": "fine-tuning and preference tuning",
    "rlhf_gpt.py": "reinforcement learning",
    "pretrain_deepseek4.py": "DeepSeek-V4",
}
"""Main programs of MindSpeed-LLM's that Megatron has no counterpart of: the file, and what it is for."""

_OF_TUNING = "it belongs to tuning, which is refused by --stage, --is-instruction-dataset and the adapters' flags"
_OF_ADAPTERS = "it belongs to --lora-target-modules, which is refused"
_OF_REINFORCEMENT = "it belongs to --stage, which is refused"

PROGRAMS = (
    *noted(
        "a tokenizer of Hugging Face's",
        "it is read with --tokenizer-type PretrainedFromHF alone",
        f"{_NAME} S",
    ),
    *noted(
        "how text is tokenized and padded",
        "data sets hold tokens already",
        """
        --tokenizer-not-use-fast
        --tokenizer-padding-side S
        """,
    ),
    *refused(
        "arguments of the tokenizer, its tokens among them",
        "Megatron passes none on; leave it out",
        "--tokenizer-kwargs S...",
    ),
    *refused("the size of the vocabulary", "it may round it up; use --padded-vocab-size", "--pad-vocab-size-to N"),
    *noted(
        "sequences of different lengths from batch to batch",
        "data sets of Megatron's have sequences of --seq-length",
        "--variable-seq-lengths",
    ),
    *noted("reports which documents a batch has", "the same results", "--return-document-ids"),
    *refused(
        "another order or choice of samples",
        "Megatron's data sets do not have it; leave it out",
        """
        --no-shuffle
        --padded-samples
        """,
    ),
    *refused(
        "tuning on instructions, or by preferences and rewards",
        "pretraining alone is available; leave it out",
        """
        --stage S
        --is-instruction-dataset
        --is-pairwise-dataset
        --neat-pack
        --lora-target-modules S...
        --lora-load S
        --lu-lora-final-layer-index N
        --qlora
        --qlora-nf4
        """,
    ),
    *noted(
        "data and prompts of tuning",
        _OF_TUNING,
        """
        --prompt-type S
        --prompt-type-path S
        --full-shuffle-instruction-dataset
        --cut-max-seqlen
        --no-cut-token
        --no-pad-to-seq-lengths
        --pad-to-multiple-of N
        --dataset-additional-keys S...
        --enable-thinking S
        --drop-thinking S
        --reasoning-effort S
        --history-turns N
        """,
    ),
    *noted(
        "numbers of adapters",
        _OF_ADAPTERS,
        """
        --lora-r N
        --lora-alpha N
        --lora-fusion
        --lora-ckpt-filter
        --lora-modules-to-save S...
        --lora-register-forward-hook S...
        --lu-lora-lr X
        --lu-lora-lr-ratio X
        --qlora-save-dequantize
        """,
    ),
    *noted(
        "numbers of preferences and rewards",
        _OF_REINFORCEMENT,
        """
        --dpo-beta X
        --dpo-ftx X
        --dpo-label-smoothing X
        --dpo-loss-type S
        --pref-ftx X
        --ref-model S
        --refer-model-iter N
        --simpo-beta X
        --simpo-label-smoothing X
        --simpo-loss-type S
        --gamma-beta-ratio X
        --reward-model S
        --reward-tokens S...
        --placeholder-token S
        --advantage-whiten S
        --clip-ratio X
        --cliprange-value X
        --critic-mini-batch-size N
        --critic-update-epochs N
        --entropy-coeff X
        --extract-content-for-reward S
        --gamma X
        --kl-coef X
        --lam X
        --max-prompt-length N
        --missing-eos-penalty X
        --n-samples-per-prompt N
        --num-samples-per-step N
        --num-gpus-for-infer N
        --num-gpus-for-train N
        --inference-tensor-model-parallel-size N
        --ppo-epochs N
        --ppo-mini-batch-size N
        --rollout-batch-size N
        --shuffle-minibatch
        --dataset-category S
        --do-sample
        --verifier
        """,
    ),
    *noted(
        "preparation of data",
        "training does not read it",
        """
        --input S
        --output-prefix S
        --workers N
        --handler-name S
        --json-keys S...
        --append-eod
        --cache-dir S
        --dataset-dir S
        --dataset-impl {lazy,cached,mmap}
        --datasets S...
        --hf-datasets-params S
        --interleave-probs S
        --keep-newlines
        --map-keys S
        --max-samples N
        --merge-group-keys S...
        --mix-strategy {concat,interleave_under,interleave_over}
        --n-subs N
        --overwrite-cache
        --pack
        --script-data-dir S
        --split-sentences
        --streaming
        """,
    ),
    *noted(
        "generation and evaluation",
        "training does not read it",
        """
        --add-eos-token S...
        --alternative-prompt
        --broadcast
        --chain-of-thought
        --eval-language {en,zh}
        --evaluation-batch-size N
        --greedy
        --hf-chat-template
        --inference-prompt-type S
        --instruction-template S
        --max-eval-samples N
        --max-length N
        --max-new-tokens N
        --no-chat-template
        --origin-postprocess
        --task S...
        --task-data-path S...
        --temperature X
        --top-k N
        --top-p X
        --use-kv-cache
        """,
    ),
    *refused(
        "checkpoints converted on the way in or out, or read in part",
        "Megatron reads and writes its own; convert beforehand, and leave it out",
        """
        --enable-hf2mg-convert
        --enable-mg2hf-convert
        --load-checkpoint-loosely
        """,
    ),
    *noted(
        "how checkpoints are converted",
        "it belongs to --enable-hf2mg-convert and --enable-mg2hf-convert, which are refused",
        """
        --model-type-hf S
        --hf-cfg-dir S
        --hf-save-dir S
        --mg-save-dir S
        --only-convert-last-checkpoint
        --save-layer-by-layer
        --save-lora-to-hf
        """,
    ),
)

PROGRAMS_VALUES = (
    Record(
        "--tokenizer-type",
        "PretrainedFromHF",
        "a tokenizer of Hugging Face's",
        Disposition.TRANSLATED,
        "HuggingFaceTokenizer, with --tokenizer-name-or-path as --tokenizer-model, and --trust-remote-code",
        _pretrained,
    ),
    *records(
        Disposition.REFUSED,
        "Magistral's tokenizer",
        "Megatron does not have it; use HuggingFaceTokenizer",
        "--tokenizer-type MagistralTokenizer",
    ),
    *records(
        Disposition.REFUSED,
        "types of eight bits of the NPU's",
        "Megatron does not have it; use e4m3 or hybrid",
        "--fp8-format hif8",
    ),
    *records(
        Disposition.REFUSED,
        "scales for groups of numbers",
        "this Megatron does not have it; use another recipe",
        "--fp8-recipe groupwise",
    ),
)
