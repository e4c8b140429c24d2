"""The configuration of context parallelism: what the flags say, checked once."""

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args

from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.program import Transport
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.topology import CPTopology

LatentForm = Literal["expanded", "latent", "absorbed"]
KVCachePolicy = Literal["full", "half"]
Algorithm = Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"]
AttentionMaskType = Literal["causal", "general"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "context_parallel_algo": get_args(Algorithm),
    "attention_mask_type": get_args(AttentionMaskType),
    "context_parallel_kv_cache_policy": get_args(KVCachePolicy),
    "context_parallel_latent": get_args(LatentForm),
}
"""Fields that take one of a few values, with those values."""

_WITH_RING: tuple[Algorithm, ...] = ("megatron_cp_algo", "hybrid_cp_algo")
_OF_A_RING = ("cp_window_size", "context_parallel_kv_cache_policy", "context_parallel_cache_interval")
"""Those that --cp-window-size says something about."""


_NEEDED: dict[object, str] = {bool: "True or False", int: "a whole number", int | None: "a whole number, or None"}
"""What fields of these types are given, in words."""

OF_ONE_RANK = (
    "attention_on_one_rank",
    "use_alibi",
    "attention_mask_type",
    "megatron_cp_in_bnsd",
    "context_parallel_kernels",
)
"""Fields that mean something where one rank's attention is the plugin's."""


class ConfigurationError(ValueError):
    """Options that cannot be honoured as they are set: a sentence each, with name, value, rule and a way out."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """One for each option, in the order in which they were found."""
        return tuple(dict.fromkeys(self.args))

    def __str__(self) -> str:
        if len(self.sentences) == 1:
            return self.sentences[0]
        return "\n  ".join([f"{len(self.sentences)} things stand in the way:", *self.sentences])


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class ContextParallelConfig:
    """What the context-parallel flags say. Field names are the flags' names, meanings are MindSpeed's.

    Raises ConfigurationError when a value breaks a rule. What depends on the model is checked by `check_model`.
    """

    context_parallel_size: int = 1
    context_parallel_algo: Algorithm = field(
        default="ulysses_cp_algo",
        metadata={
            "help": "How attention is computed over the context-parallel ranks: Ulysses (all-to-all over heads), ring "
            "attention (a double ring with --cp-window-size above 1), Ulysses inside and a ring outside, or all K/V "
            "gathered at once."
        },
    )
    cp_window_size: int = field(
        default=1,
        metadata={
            "help": "Ranks in each inner ring of ring attention; 1 is the plain ring, above 1 the double ring. "
            "It divides the ring's size."
        },
    )
    ulysses_degree_in_cp: int | None = field(
        default=None,
        metadata={"help": "Ranks in each Ulysses group of hybrid_cp_algo; above 1, below --context-parallel-size."},
    )
    use_cp_send_recv_overlap: bool = field(
        default=False,
        metadata={"help": "Let the next K/V block of a ring travel while the present one is computed."},
    )
    context_parallel_kv_cache_policy: KVCachePolicy | None = field(
        default=None,
        metadata={
            "help": "What a ring keeps of the keys and values that it receives, so that they do not travel again in "
            "the backward pass: full keeps both, half the keys. By default nothing is kept."
        },
    )
    context_parallel_cache_interval: int = field(
        default=0,
        metadata={
            "help": "With --context-parallel-kv-cache-policy: layers between two that keep; 0: every layer keeps."
        },
    )
    context_parallel_latent: LatentForm = field(
        default="expanded",
        metadata={
            "help": "What travels with --multi-latent-attention: the keys and values of all heads; the latent, of "
            "which each rank makes them again; or the latent as the one key head of queries that the up projection is "
            "multiplied into."
        },
    )
    context_parallel_keep_outputs: bool = field(
        default=False,
        metadata={
            "help": "With --recompute-granularity: keep what attention gives, so that a recomputed layer neither "
            "computes nor sends it again. Costs a layer's attention output and log-sum-exp in each micro-batch under "
            "way; with Ulysses the exchanged q, k, v and output too."
        },
    )
    attention_mask_type: AttentionMaskType = field(
        default="causal",
        metadata={
            "help": "causal: each token sees itself and what came before. general: the mask that the batch carries; "
            "where it carries none, what the layer's own mask type says, which is causal in a GPT."
        },
    )
    megatron_cp_in_bnsd: bool = field(
        default=False,
        metadata={"help": "Hand the attention kernel contiguous tensors in BNSD order instead of views of SBH."},
    )
    context_parallel_kernels: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Attention kernels to use, the preferred first, and no others; python -m mindspeed_cp lists them. "
            "By default the fastest that can compute the case at hand."
        },
    )
    use_alibi: bool = field(
        default=False,
        metadata={
            "help": "ALiBi: let the score of a query and a key fall with their distance, in each head by a slope of "
            "its own; with --context-parallel-size 1 attention is then this plugin's too. Megatron's position "
            "embedding stays beside it, unless --position-embedding-type none leaves it out."
        },
    )
    attention_on_one_rank: bool = field(
        default=False,
        metadata={
            "help": "Compute attention by this plugin with --context-parallel-size 1 too: dropout then drops what it "
            "drops on more ranks, and --reset-attention-mask makes no mask."
        },
    )

    def __post_init__(self) -> None:
        self._check_types()
        size, inner, degree = self.context_parallel_size, self.cp_window_size, self.ulysses_degree_in_cp
        for name in ("context_parallel_size", "cp_window_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{flag(name)} {getattr(self, name)} is below 1; use 1 or more.")
        for option in fields(self):
            value, choices = getattr(self, option.name), CHOICES.get(option.name, ())
            if choices and value not in choices and value != option.default:
                raise ConfigurationError(f"{flag(option.name)} {value} is unknown; use {or_list(choices)}.")
        self._check_interval()
        form = self.context_parallel_latent
        if self.context_parallel_kv_cache_policy == "half" and form != "expanded":
            raise ConfigurationError(
                f"--context-parallel-kv-cache-policy half with --context-parallel-latent {form}: keys and values are "
                f"made of the one latent, which is kept or not; use full, or leave it out."
            )
        if size == 1:
            return
        if self.context_parallel_algo == "hybrid_cp_algo":
            self._check_degree(size, degree)
        if self.context_parallel_algo in _WITH_RING and self._ring_size % inner:
            raise ConfigurationError(
                f"--cp-window-size {inner} does not divide the ring of {self._ring_size} ranks; "
                f"use {or_list(divisors(self._ring_size))}."
            )

    def _check_types(self) -> None:
        for option in fields(self):
            value, needed = getattr(self, option.name), _NEEDED.get(option.type)
            is_number = isinstance(value, Integral) and not isinstance(value, bool)
            fits = isinstance(value, bool) if option.type is bool else is_number
            if needed and not fits and value is not option.default:
                raise ConfigurationError(f"{flag(option.name)} is {value!r}; give {needed}.")

    def _check_interval(self) -> None:
        interval = self.context_parallel_cache_interval
        if interval < 0:
            raise ConfigurationError(f"--context-parallel-cache-interval {interval} is below 0; use 0 or more.")
        if interval and not self.context_parallel_kv_cache_policy:
            raise ConfigurationError(
                f"--context-parallel-cache-interval {interval} is of the layers that keep K/V, and none does without "
                f"--context-parallel-kv-cache-policy; use full or half, or leave it out."
            )

    def _check_degree(self, size: int, degree: int | None) -> None:
        proper = [divisor for divisor in divisors(size) if 1 < divisor < size]
        if not proper:
            raise ConfigurationError(
                f"--context-parallel-algo hybrid_cp_algo needs a --context-parallel-size with a divisor between 1 and "
                f"itself, and {size} has none; use a size like 4, 6 or 8, ulysses_cp_algo or megatron_cp_algo."
            )
        if degree is None:
            raise ConfigurationError(
                f"--context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp; use {or_list(proper)}."
            )
        if degree <= 1:
            raise ConfigurationError(
                f"--ulysses-degree-in-cp {degree} is not above 1; use {or_list(proper)}, or megatron_cp_algo."
            )
        if size % degree:
            raise ConfigurationError(
                f"--ulysses-degree-in-cp {degree} does not divide --context-parallel-size {size}; "
                f"use {or_list(proper)}."
            )
        if degree == size:
            raise ConfigurationError(
                f"--ulysses-degree-in-cp {degree} leaves no ring in --context-parallel-size {size}; "
                f"use {or_list(proper)}, or ulysses_cp_algo."
            )

    @property
    def _ring_size(self) -> int:
        return self.context_parallel_size // self.ulysses_size

    @property
    def ulysses_size(self) -> int:
        """Ranks in each Ulysses group; 1 for a ring."""
        if self.context_parallel_size == 1 or self.context_parallel_algo == "ulysses_cp_algo":
            return self.context_parallel_size
        if self.context_parallel_algo == "hybrid_cp_algo" and self.ulysses_degree_in_cp:
            return self.ulysses_degree_in_cp
        return 1

    @property
    def computes_attention(self) -> bool:
        """Whether attention is this plugin's."""
        return self.context_parallel_size > 1 or self.computes_on_one_rank

    @property
    def computes_on_one_rank(self) -> bool:
        """Whether attention is this plugin's where nothing is parallel, too."""
        return self.attention_on_one_rank or self.use_alibi

    @property
    def topology(self) -> CPTopology:
        """The grid that the algorithm spans over the ranks."""
        if self.context_parallel_size == self.ulysses_size:
            return CPTopology(ulysses=self.ulysses_size)
        is_double = self.cp_window_size > 1 and self.context_parallel_algo in _WITH_RING
        inner = self.cp_window_size if is_double else self._ring_size
        return CPTopology(outer=self._ring_size // inner, inner=inner, ulysses=self.ulysses_size)

    def over(self, size: int) -> "ContextParallelConfig":
        """The same for so many ranks: groups and inner rings have as many as divide both these and what they had.

        A hybrid whose Ulysses groups are then all of the ranks is Ulysses, and one whose groups have one is a ring.
        """
        algorithm, degree = self.context_parallel_algo, self.ulysses_degree_in_cp
        if algorithm == "hybrid_cp_algo" and degree is not None:
            degree = math.gcd(degree, size)
            if degree in (1, size):
                algorithm, degree = "megatron_cp_algo" if degree == 1 else "ulysses_cp_algo", None
        inner = self.cp_window_size
        if algorithm in _WITH_RING:
            inner = math.gcd(inner, size // (degree or 1))
        return replace(
            self,
            context_parallel_size=size,
            context_parallel_algo=algorithm,
            ulysses_degree_in_cp=degree,
            cp_window_size=inner,
        )

    @property
    def kept_policy(self) -> KVCachePolicy | None:
        """What is kept of received K/V; None where no ring receives any."""
        return self.context_parallel_kv_cache_policy if self.context_parallel_algo in _WITH_RING else None

    def keeps_in(self, layer_number: int) -> bool:
        """Whether this layer keeps K/V for its backward pass. layer_number: from 1 on."""
        interval = self.context_parallel_cache_interval
        return self.kept_policy is not None and (layer_number - 1) % (interval + 1) == 0

    @property
    def transport(self) -> Transport | None:
        """How K/V travel between those that hold them; None for the cheapest way for what is seen."""
        return Transport.ALL_GATHER if self.context_parallel_algo == "kvallgather_cp_algo" else None

    @property
    def layout(self) -> SequenceLayout:
        """How Megatron shards each sequence."""
        return SequenceLayout(size=self.context_parallel_size)

    def ineffective_flags(self) -> list[str]:
        """A sentence for each flag that is set and changes nothing with this algorithm and size."""
        reason: dict[str, str] = {}
        algorithm_flags = [f.name for f in fields(self) if f.name != "context_parallel_size"]
        if self.context_parallel_size == 1 and self.computes_on_one_rank:
            travelling = [name for name in algorithm_flags if name not in OF_ONE_RANK]
            reason = dict.fromkeys(travelling, "--context-parallel-size 1, where nothing travels")
        elif self.context_parallel_size == 1:
            reason = dict.fromkeys(algorithm_flags, "--context-parallel-size 1, where attention stays Megatron's own")
        else:
            reason["attention_on_one_rank"] = "--context-parallel-size above 1, where attention is this plugin's anyway"
            here = f"--context-parallel-algo {self.context_parallel_algo}"
            if self.context_parallel_algo not in _WITH_RING:
                reason |= dict.fromkeys(_OF_A_RING, f"{here}, which has no ring")
            if self.context_parallel_algo == "ulysses_cp_algo":
                reason["use_cp_send_recv_overlap"] = f"{here}, which has no ring"
            if self.context_parallel_algo != "hybrid_cp_algo":
                reason["ulysses_degree_in_cp"] = f"{here}; only hybrid_cp_algo reads it"
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return [f"{flag(name)} has no effect with {why}." for name, why in reason.items() if name in changed]

    def check_model(
        self,
        *,
        num_attention_heads: int,
        num_query_groups: int | None = None,
        tensor_model_parallel_size: int = 1,
        num_layers: int | None = None,
    ) -> None:
        """Raise ConfigurationError with all broken rules unless a model of this shape can be split as configured.

        num_query_groups: number of K/V heads, where it is not the number of attention heads.
        num_layers: layers of the model, where they are known beforehand.
        """
        if self.context_parallel_size == 1:
            return
        broken = []
        interval = self.context_parallel_cache_interval
        if num_layers is not None and interval >= num_layers:
            broken.append(
                f"--context-parallel-cache-interval {interval} is not below the {num_layers} layers of the model; use "
                f"0 to {num_layers - 1}."
            )
        if num_query_groups is not None and num_attention_heads % num_query_groups:
            fitting = or_list(divisors(num_attention_heads))
            broken.append(
                f"--num-query-groups {num_query_groups} does not divide --num-attention-heads {num_attention_heads}; "
                f"use {fitting}."
            )
        heads, degree = num_attention_heads // tensor_model_parallel_size, self.ulysses_size
        if heads < degree:
            broken.append(
                f"--num-attention-heads {num_attention_heads} with --tensor-model-parallel-size "
                f"{tensor_model_parallel_size} gives each rank {heads}, fewer than the Ulysses degree {degree} "
                f"({self._degree_flag}), which wants one at least for each of its ranks; "
                f"use {self._fitting_degrees(heads)}megatron_cp_algo."
            )
        if broken:
            raise ConfigurationError(*broken)

    @property
    def _degree_flag(self) -> str:
        hybrid = self.context_parallel_algo == "hybrid_cp_algo"
        return "--ulysses-degree-in-cp" if hybrid else "--context-parallel-size"

    def _fitting_degrees(self, heads: int) -> str:
        """Hybrids of this size that would do with so many heads a rank, as the middle of a sentence; else empty."""
        fitting = [degree for degree in divisors(self.context_parallel_size)[1:-1] if degree <= heads]
        hybrid = "" if self.context_parallel_algo == "hybrid_cp_algo" else "hybrid_cp_algo with "
        return f"{hybrid}a --ulysses-degree-in-cp of {or_list(fitting)}, or " if fitting else ""
