"""Pass-Q: queries go around and meet the keys where these are; their states come home and are merged.

    step        0   1   2   3        of four ranks; columns of a row are ranks
    owner       0   1   2   3
                3   0   1   2
                2   3   0   1
                1   2   3   0
    home        then each rank has a state for every owner, which all go home in one all-to-all

Note [Home in pieces]
    Nothing is left to hide that all-to-all behind. With `pieces` above 1 each step is worked on piece by piece (a piece
    is a share of the K/V heads, with their query heads; Note [Pieces] in program/rotation.py), and the states of a
    piece go home while the next one is computed: but for those of the last piece. Every rank's queries have left before
    its first states do, so that any two ranks meet in one order.

A bias has its rows where the queries are, and its columns are keys: before the first step each rank is sent those rows
and columns that it will compute with, in an all-to-all of their own.

Shapes: B batch, N query heads, G key/value heads, S new tokens of this rank, T this rank's keys, D key head size, V
value head size.

Source: Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783, algorithm 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.attention.blocks import in_one
from mindspeed_cp.attention.exchange import QUERIES, KeyValues, Player
from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.attention.terms import TermsOfTiles, places_in_stream, places_of_batch
from mindspeed_cp.comm import Addressed, Communicator, Sizes, Transfer
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.inference.local import attention_of
from mindspeed_cp.inference.ring_call import RingCall
from mindspeed_cp.inference.states import State
from mindspeed_cp.kernels import TileOutput
from mindspeed_cp.kernels.calls import Call
from mindspeed_cp.kernels.places import ALL, in_all_samples, of_sample, part, place_within
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.kernels.protocol import part_of
from mindspeed_cp.program import (
    BlockName,
    Phase,
    Program,
    Step,
    TransposedPlan,
    cheapest_transport,
    num_tokens,
    program,
)
from mindspeed_cp.program.transposed import transposed


@dataclass(frozen=True)
class PassQ(RingCall):
    """One attention whose queries travel; its arguments are in order. See `ring_pass_q_attention`."""

    def __call__(self) -> State:
        """Of this rank's queries over the keys of all ranks."""
        with torch.no_grad(), autocast_off(self.q.device.type):
            made, came = self._made(), self._bias_of_visitors()
            player = Player(made.program, Phase.FORWARD, self.schedule, self.communicators, self.overlap)
            # What travels are tokens with numbers of heads, as keys do; there are no values beside them.
            queries = KeyValues(player, self.q, self.q[..., :0], kind=QUERIES)
            homes = _Homes(self, made.program)
            for number, step in enumerate(queries.steps()):
                if step.tiles:
                    with player.step(step.owner):
                        found = self._found(step, made.calls[number], queries, player, came)
                        homes.states[step.owner, step.piece] = found
                homes.leave_after(number)
            return self.asked.finished(homes.merged(), self.q.dtype)

    @property
    def turned(self) -> TransposedPlan:
        """The plan in which queries and keys have changed places."""
        return TransposedPlan(self.plan)

    def _made(self) -> "_Made":
        turned, schedule, overlap = self.turned, self.schedule, self.overlap
        transport = self.transport or cheapest_transport(turned, schedule, ahead=overlap)

        def make() -> _Made:
            made = program(
                *(turned, schedule, self.rank, Phase.FORWARD), transport=transport, pieces=self.pieces, ahead=overlap
            )
            share = self.case.of_piece(self.pieces)
            return _Made(
                made,
                tuple(
                    self.asked.calls(tuple(map(transposed, step.tiles)), self.case if step.piece is None else share)
                    for step in made.steps
                ),
            )

        key = schedule, self.rank, transport, overlap, self.pieces, self.asked.kernels, self.case
        return turned.once(key, make)

    def _found(
        self,
        step: Step,
        calls: Sequence[Call],
        queries: KeyValues,
        player: Player,
        came: "dict[int, _Rows]",
    ) -> "_Found":
        """The state of an owner's queries that are at hand over this rank's keys, of a piece of the heads."""
        block = queries.block(step)
        heads, kv_heads = (player.heads(step.piece, x.size(1)) for x in (self.q, self.k))
        k, v = part(self.k, 1, kv_heads), part(self.v, 1, kv_heads)
        told = _TermsOfVisitors(self.plan, step.owner, self.asked.terms, self.case.terms, block.k)
        told.came = came.get(step.owner)
        return _Found(block.tokens, attention_of(calls, block.k, k, v, told, self.rank, block.tokens, heads))

    def _bias_of_visitors(self) -> "dict[int, _Rows]":
        """By owner of queries, the rows of the bias that this rank computes with; nothing where there is no bias."""
        bias, turned, rank = self.asked.terms.bias, self.turned, self.rank
        if bias is None:
            return {}
        found = {rank: _Rows((slice(0, self.q.size(2)),), self._columns(bias, (slice(0, self.q.size(2)),), rank))}
        if self.communicator is None or self.size == 1:
            return found
        others = [other for other in range(self.size) if other != rank]
        leaving, coming = [0] * self.size, [0] * self.size
        each = bias.size(0) * bias.size(1)
        for other in others:
            leaving[other] = each * num_tokens(turned.needed(other, rank)) * self.plan.keys.num_tokens(other)
            coming[other] = each * num_tokens(turned.needed(rank, other)) * self.k.size(2)
        parts = [self._columns(bias, turned.needed(other, rank), other) for other in others if leaving[other]]
        message = torch.cat([bias.new_empty(0), *(x.flatten() for x in parts)])
        received = self.communicator.all_to_all(message, Sizes(leaving, coming)).split(coming)
        for other in others:
            if coming[other]:
                shape = *bias.shape[:2], -1, self.k.size(2)
                found[other] = _Rows(turned.needed(rank, other), received[other].view(shape))
        return found

    def _columns(self, bias: Tensor, rows: Sequence[slice], rank: int) -> Tensor:
        """Of some rows the columns that are a rank's keys, in its order."""
        held = in_one([part(bias, 2, each) for each in rows])
        places = self.plan.once(("places", rank, True), lambda: places_in_stream(self.plan, rank, of_keys=True))
        if places.size(0) == 1:
            return held.index_select(3, places[0].to(bias.device))
        index = places_of_batch(places, bias.size(0)).to(bias.device)
        return held.gather(3, index[:, None, None].expand(*held.shape[:3], -1))


@dataclass(frozen=True, eq=False)
class _Made:
    """A rank's program, and the calls of kernels for each step."""

    program: Program
    calls: tuple[tuple[Call, ...], ...]


class _Rows(NamedTuple):
    """Rows of a bias, those of an owner's queries `tokens`, over this rank's keys: [1 or B, 1 or N, s, T]."""

    tokens: Sequence[slice]
    bias: Tensor


class _TermsOfVisitors(TermsOfTiles):
    """Terms of queries that have come. came: the bias of their rows, whose columns are this rank's keys."""

    came: _Rows | None = None

    def bias_of(self, bias: Tensor, owner: int, call: Call, heads: slice) -> Tensor:
        """See TermsOfTiles."""
        assert self.came is not None, "rows of a bias come before their queries"
        (tile,) = call.tiles
        rows = part_of(self.came.bias, of_sample(tile.sample), heads)
        assert rows is not None
        return rows[..., place_within(self.came.tokens, tile.queries), tile.keys]


@dataclass(frozen=True, eq=False)
class _Found:
    """State of those tokens of an owner's queries that have come here, of the heads of a piece."""

    tokens: tuple[slice, ...]
    state: TileOutput

    def pack(self, wanted: tuple[slice, ...], message: Tensor) -> None:
        """Write the states of some tokens into a message [tokens, B, heads, V + 1], one after another."""
        for tokens in wanted:
            here, there = place_within(self.tokens, tokens), message[place_within(wanted, tokens)]
            there[..., :-1].copy_(part(self.state.out, 2, here).permute(2, 0, 1, 3))
            there[..., -1].copy_(part(self.state.lse, 2, here).permute(2, 0, 1))


class _Coming(NamedTuple):
    """States of this rank's queries, as rows from each rank [tokens, B, heads, V + 1], and what brings them."""

    heads: slice
    rows: Sequence[Tensor]
    transfer: Transfer | None = None


class _Homes:
    """States on their way to the owners of the queries, and those that come; see Note [Home in pieces].

    states: what was found here, by owner and piece.
    """

    def __init__(self, call: PassQ, made: Program) -> None:
        self.states: dict[BlockName, _Found] = {}
        self._call, self._pieces = call, made.pieces
        self._coming: list[_Coming] = []
        ranks, turned = range(call.size), call.turned
        self._leave = [() if rank == call.rank else turned.needed(call.rank, rank) for rank in ranks]
        self._come = [() if rank == call.rank else turned.needed(rank, call.rank) for rank in ranks]
        self._sizes = Sizes([num_tokens(each) for each in self._leave], [num_tokens(each) for each in self._come])
        self._after: list[int] = []
        if made.pieces > 1 and call.size > 1:
            self._after = self._last_steps(made) if call.overlap else [len(made.steps)] * made.pieces

    @staticmethod
    def _last_steps(made: Program) -> list[int]:
        """Of each piece, the step after which its states may leave: no queries do any more."""
        last = max((number for number, step in enumerate(made.steps) if step.sends or step.receives), default=0)
        found = []
        for piece in range(made.pieces):
            worked = (number for number, step in enumerate(made.steps) if step.tiles and step.piece in (None, piece))
            last = max(last, *worked, 0)
            found.append(last)
        return found

    def leave_after(self, number: int) -> None:
        """Have those states leave that are done after a step."""
        while len(self._coming) < len(self._after) and self._after[len(self._coming)] <= number:
            self._start(len(self._coming))

    def merged(self) -> TileOutput:
        """This rank's states, with those of the others once they are there."""
        call = self._call
        merged = MergedOutput.of(call.q, call.v.size(3))
        for (owner, piece), found in self.states.items():
            if owner == call.rank:
                merged.merge(found.state, in_all_samples(slice(0, call.q.size(2))), self._heads(piece))
        if call.communicator is not None and call.size > 1:
            while len(self._coming) < len(self._after):  # Without overlap, or where a rank's last steps are left out.
                self._start(len(self._coming))
            coming = self._coming if self._after else [self._of_all(call.communicator)]
            for each in coming:
                if each.transfer is not None:
                    each.transfer.wait()
                for tokens, rows in zip(self._come, each.rows, strict=True):
                    for some in tokens:
                        state = rows[place_within(tokens, some)].permute(1, 2, 0, 3)
                        merged.merge(TileOutput(state[..., :-1], state[..., -1]), in_all_samples(some), each.heads)
        return merged.result(accumulation_dtype(call.q.dtype))

    def _heads(self, piece: int | None) -> slice:
        """The query heads of a piece."""
        if piece is None:
            return ALL
        share = self._call.q.size(1) // self._pieces
        return slice(piece * share, (piece + 1) * share)

    def _of_all(self, communicator: Communicator) -> _Coming:
        """States of all heads, in one all-to-all."""
        received = communicator.all_to_all(self._message(range(self._pieces)), self._sizes)
        return _Coming(ALL, received.split(list(self._sizes.received)))

    def _start(self, piece: int) -> None:
        """States of a piece of the heads, under way."""
        communicator, message = self._call.communicator, self._message([piece])
        assert communicator is not None, "a rank that is alone has all of its states"
        rows = message.new_empty(sum(self._sizes.received), *message.shape[1:]).split(list(self._sizes.received))
        parts = enumerate(message.split(list(self._sizes.sent)))
        transfer = communicator.exchange_all(
            [Addressed(rank, x) for rank, x in parts if x.numel()],
            [Addressed(rank, x) for rank, x in enumerate(rows) if x.numel()],
        )
        self._coming.append(_Coming(self._heads(piece), rows, transfer))

    def _message(self, pieces: Sequence[int]) -> Tensor:
        """The states that leave, of some pieces of the heads: [tokens, B, heads, V + 1], by their owners."""
        q, size = self._call.q, self._call.v.size(3)
        share = q.size(1) // self._pieces
        message = q.new_empty(
            *(sum(self._sizes.sent), q.size(0), share * len(pieces), size + 1), dtype=accumulation_dtype(q.dtype)
        )
        rows = message.split(list(self._sizes.sent))
        for (owner, piece), found in self.states.items():
            # A step of all heads is all pieces of a message of all of them.
            if self._leave[owner] and (piece is None or piece in pieces):
                first = 0 if piece is None else (piece - pieces[0]) * share
                heads = slice(first, first + found.state.out.size(1))
                found.pack(self._leave[owner], rows[owner][:, :, heads])
        return message
