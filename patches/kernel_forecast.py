"""Which kernels will compute a model's attention, as far as parsed arguments tell: asked before anything starts."""

import argparse

import torch

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.documents import band_of
from mindspeed_cp.heads import HeadLayout
from mindspeed_cp.kernels import KERNELS, Term, TileCase, Window
from mindspeed_cp.kernels.calls import Call, calls
from mindspeed_cp.patches.any_length import sample_length
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band
from mindspeed_cp.sharding import SequenceLayout

_Bands = tuple[Band, ...]


def check_kernels(args: argparse.Namespace, config: ContextParallelConfig, device: str | None) -> None:
    """Raise ConfigurationError where no kernel, of those that the user allows, can compute the model's attention.

    args: Megatron's. device: the type of where it will be computed; None where this is not the machine that will.
    """
    try:
        _calls(args, config, device)
    except NotImplementedError as error:
        raise ConfigurationError(
            f"--context-parallel-kernels {' '.join(config.context_parallel_kernels)}: {error}\n"
            f"{_way_out(args, config, device)}"
        ) from error


def _way_out(args: argparse.Namespace, config: ContextParallelConfig, device: str | None) -> str:
    others = "Name another kernel as well, or leave the flag out"
    try:
        _calls(args, config, device, drops=False)
    except NotImplementedError:
        return f"{others}."
    # by_kernel, which their reason names, is an argument of programs: no flag seeds the generators that it would need.
    return (
        f"{others}: the reference kernel drops alike on any number of ranks; or use --attention-dropout 0, no "
        f"flag lets a kernel draw by itself."
    )


def kernel_notes(args: argparse.Namespace, config: ContextParallelConfig, device: str | None) -> list[str]:
    """A sentence where an accelerator has no kernel of its own for the model's attention, and so runs the reference, or
    where this is not the machine that will run it.
    """
    if config.context_parallel_size > 1 and device is None:
        return [
            "there is no accelerator here, so that kernels were not asked; python -m mindspeed_cp check on a machine "
            "of the job says which can compute this attention."
        ]
    if config.context_parallel_kernels:
        return []
    try:
        made = _calls(args, config, device)
    except NotImplementedError:  # Said as what stands in the way.
        return []
    slow = [call for call in made if call.kernel.name == "reference" and call.case.device_type != "cpu"]
    of_masks = {(call.case.window, call.case.masked): call for call in reversed(slow)}  # The first of each says enough.
    return [
        f"attention runs the reference kernel, which is exact, but slow, and holds all scores of a block: "
        f"{KERNELS.explain(call.case)}"
        for call in reversed(of_masks.values())
    ]


def kernel_names(args: argparse.Namespace, config: ContextParallelConfig, device: str | None) -> str:
    """The kernels that will compute the model's attention, in words."""
    try:
        return " and ".join(dict.fromkeys(call.kernel.name for call in _calls(args, config, device))) or "any"
    except NotImplementedError:  # Said as what stands in the way.
        return "none"


def _calls(
    args: argparse.Namespace, config: ContextParallelConfig, device: str | None, *, drops: bool | None = None
) -> list[Call]:
    """The calls of kernels that the model's attention will be computed by; none where the device is not known.

    drops: whether probabilities are dropped; None for what the arguments say.

    Raises NotImplementedError where none of the kernels that the user allows can compute one.
    """
    length = sample_length(args)
    needed = (args.num_attention_heads, args.hidden_size)
    if device is None or not config.computes_attention or length is None or None in needed:
        return []
    drops = bool(args.attention_dropout) if drops is None else drops
    head_size, value_head_size = _head_sizes(args, config)
    cases = [
        TileCase(
            device_type=device,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            window=Window(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            num_queries=0,
            num_keys=0,
            head_size=head_size,
            value_head_size=value_head_size,
            compute_capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        )
        for num_heads, num_kv_heads in _heads_of_calls(args, config)
    ]
    kernels = KERNELS.only(config.context_parallel_kernels or KERNELS.names)
    layout = SequenceLayout(size=config.topology.ring_size)
    num_tokens = length // layout.size
    # Of another length the tiles are about the same.
    shards = layout.of(num_tokens - num_tokens % layout.chunks_per_rank)
    pairs = [(0, 0)] if shards.num_ranks == 1 else [(0, 0), (0, 1), (1, 0)]
    return [
        call
        for bands, masked in _kinds_of_layers(args, config)
        for pair in pairs
        for case in cases
        for call in calls(
            AttentionPlan(shards, shards, bands).tiles(*pair),
            case._replace(masked=masked, terms=_terms(config, bands, drops)),
            kernels,
        )
    ]


def _head_sizes(args: argparse.Namespace, config: ContextParallelConfig) -> tuple[int, int]:
    """Of queries and keys, and of values."""
    if not args.multi_latent_attention:
        size = args.kv_channels or args.hidden_size // args.num_attention_heads
        return size, size
    if config.context_parallel_latent == "absorbed":
        return args.kv_lora_rank + args.qk_pos_emb_head_dim, args.kv_lora_rank
    return args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim


def _heads_of_calls(args: argparse.Namespace, config: ContextParallelConfig) -> list[tuple[int, int]]:
    """Query and K/V heads of what ranks give to kernels, each different pair once; none where there are too few."""
    kv_heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    over = args.tensor_model_parallel_size
    heads, kv_heads = args.num_attention_heads // over, max(kv_heads // over, 1)
    if args.multi_latent_attention and config.context_parallel_latent == "absorbed":
        kv_heads = 1
    if heads < config.ulysses_size or heads % kv_heads:
        return []  # Said as what stands in the way.
    dealt = HeadLayout(heads, kv_heads, config.ulysses_size)
    of_ranks = zip(dealt.queries.given, dealt.keys.given, strict=True)
    return list(dict.fromkeys((len(queries), len(keys)) for queries, keys in of_ranks))


def _kinds_of_layers(args: argparse.Namespace, config: ContextParallelConfig) -> list[tuple[_Bands, bool]]:
    """Who sees whom in the layers that there are, and whether a mask tensor says it."""
    causal: list[_Bands] = [CAUSAL]
    if args.window_size is not None:
        # Without a frequency all layers have the window.
        causal = [(band_of(args.window_size),), *causal * (args.window_attn_skip_freq is not None)]
    kinds = [(bands, False) for bands in causal]
    if config.attention_mask_type == "general":
        # A layer that is given no mask is what its own type says, also where others are given one.
        kinds += [(FULL, False), (FULL, True)]
    return kinds


def _terms(config: ContextParallelConfig, bands: _Bands, drops: bool) -> frozenset[Term]:
    """What kernels are told beside who sees whom. Sinks are none: they join the log-sum-exp of what kernels give."""
    looks_ahead = any(band.ahead != 0 for band in bands)
    asked = {
        Term.DROPOUT: drops,
        Term.ALIBI: config.use_alibi,
        Term.ALIBI_AHEAD: config.use_alibi and looks_ahead,
    }
    return frozenset(term for term, is_asked in asked.items() if is_asked)
