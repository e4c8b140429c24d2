"""Plant mistakes in the library, one at a time, and see that the default tests notice each of them.

    python tests_extend/planted_mistakes.py                 # all of them: some minutes
    python tests_extend/planted_mistakes.py "stale K/V"     # some

Each is a change of the source text, made in a copy of this checkout. Prints which test is the first to fail, and exits
with 1 where none does. Run it after tests were removed: what they alone had caught shows here.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "mindspeed_cp",
    "patches",
    "scripts",
    "docs",
    "tests_extend",
    "pyproject.toml",
    "README.md",
    "README.zh-CN.md",
)


class Mistake(NamedTuple):
    """A change of one place in a file of mindspeed_cp, and the tests, of the default run, that it has to fail."""

    file: str
    right: str
    wrong: str
    tests: str


MISTAKES = {
    "dropped step": Mistake(
        "program/rotation.py",
        "                for inner in range(schedule.inner):\n",
        "                for inner in range(schedule.inner - (schedule.inner > 2)):\n",
        "attention",
    ),
    "wrong chunk order": Mistake(
        "attention/group_order.py", "if self.is_sorted:\n            return", "return", "attention"
    ),
    "a tile one token short": Mistake(
        "plan/tiles.py", "slice(k0, k1 + 1),", "slice(k0, k1 + (k0 > 0)),", "test_plan.py"
    ),
    "gradient lost": Mistake(
        "attention/exchange.py", "            self._add_message(message, received)\n", "            pass\n", "attention"
    ),
    "stale K/V": Mistake(
        "attention/exchange.py",
        "k, v = self._player.format(self._whole, message).unpack(received)",
        "k, v = self._player.format(self._whole, message).unpack(received * 0)",
        "attention",
    ),
    "lse not merged": Mistake("kernels/merge.py", "    torch.logaddexp(lse, block_lse, out=lse)\n", "", "attention"),
    "message to the wrong peer": Mistake(
        "program/rotation.py",
        "gives = message(self._peer(0, -inner),",
        "gives = message(self._peer(0, inner),",
        "test_program.py",
    ),
    "own block's second part forgotten": Mistake(
        "program/rotation.py",
        "        yield from live(Step(self.rank, rest))\n",
        "",
        "attention",
    ),
    "halo one token short": Mistake(
        "plan/seen.py",
        "bisect_right(firsts, last_key + band.behind)",
        "bisect_right(firsts, last_key + band.behind - 1)",
        "test_transports.py",
    ),
    "direct message to the wrong peer": Mistake(
        "program/straight.py",
        "return self.schedule.peer(self.rank, Hop(*divmod(number, self.schedule.inner)))",
        "return self.schedule.peer(self.rank, Hop(*divmod(number - 1, self.schedule.inner)))",
        "test_transports.py",
    ),
    "a block too many at hand or on its way": Mistake(
        "program/straight.py",
        "at_hand = max(0, place - 1)",
        "at_hand = place",
        "test_room.py",
    ),
    "what leaves ahead is not counted while it does": Mistake(
        "program/straight.py",
        "sum(leaving[place : posted + 1])",
        "sum(leaving[place + 1 : posted + 1])",
        "test_room.py",
    ),
    "a block comes ahead into a place that is still read": Mistake(
        "attention/exchange.py",
        "received = [whole.like.new_empty(numel(message.num_tokens)) for message in exchange.receives]",
        "received = [\n"
        "            self.__dict__.setdefault(f'{kind.exchange}, {count} numbers', whole.like.new_empty(count))\n"
        "            for count in (numel(message.num_tokens) for message in exchange.receives)\n"
        "        ]",
        "attention/test_every_plan.py",
    ),
    "uneven tail dropped": Mistake(
        "attention/head_exchange.py",
        "Sizes(order.sizes, [tokens]",
        "Sizes([min(order.sizes)] * size, [tokens]",
        "attention",
    ),
    "scale left out": Mistake(
        "attention/terms.py",
        "told = call.terms(terms.scale, self._q)",
        "told = call.terms(1.0, self._q)",
        "attention",
    ),
    "kernel of the forward pass not kept": Mistake(
        "attention/ring.py",
        "grads = call.kernel.backward(",
        "grads = ring.kernels.choose(call.case).backward(",
        "attention",
    ),
    "mask columns of another owner": Mistake(
        "attention/terms.py",
        "return self._place(owner, of_keys=True)[tile.sample or 0, tile.keys]",
        "return self._place(0, of_keys=True)[tile.sample or 0, tile.keys]",
        "attention",
    ),
    "merge in bf16": Mistake(
        "comm/reduction.py", "return torch.promote_types(dtype, torch.float32)", "return dtype", "attention"
    ),
    "document boundary off by one": Mistake(
        "layouts.py",
        "stop = min(end, starts[number + 1])",
        "stop = min(end, starts[number + 1] + (number == 0 and len(starts) > 2))",
        "test_layouts.py",
    ),
    "window one token short": Mistake(
        "documents.py", "None if left == -1 else left,", "None if left == -1 else max(0, left - 1),", "test_batch.py"
    ),
    "positions of another document": Mistake(
        "sharding.py",
        "[run.position - run.start for run",
        "[run.position - run.start + run.document for run",
        "test_sharding.py",
    ),
    "tokens of another document": Mistake(
        "sharding.py",
        "starts[run.document] + run.position",
        "starts[run.document - 1] + run.position",
        "test_sharding.py",
    ),
    "samples exchanged": Mistake(
        "sharding.py",
        "picked.unflatten(0, index.shape)",
        "picked.unflatten(0, index.shape).flip(0)",
        "test_sharding.py",
    ),
    "label of the next document": Mistake(
        "sharding.py",
        "last = lengths.cumsum(0)[lengths > 0] - 1",
        "last = lengths.sum(0, keepdim=True) - 1",
        "test_sharding.py",
    ),
    "relayout forgets the way back": Mistake(
        "relayout.py", "ctx.arguments = target, source,", "ctx.arguments = source, target,", "test_relayout.py"
    ),
    "what a sample leaves uneven is forgotten": Mistake(
        "layouts.py", "held, owed = deal(", "held, _ = deal(", "test_layouts.py"
    ),
    "a document ends one token early": Mistake(
        "patches/document_rule.py",
        "(tokens == end_of_document).roll(1, dims=1)",
        "(tokens == end_of_document)",
        "patches/test_packing.py",
    ),
    "a layer's window one token short": Mistake(
        "patches/attention.py",
        "    return behind, ahead\n",
        "    return behind - 1, ahead\n",
        "patches/test_attention.py",
    ),
    "rotary positions run on": Mistake(
        "patches/packing.py",
        "(places(layout, rank, device) if over_stream else positions(layout, rank, device))[0]",
        "places(layout, rank, device)[0] % 8",
        "patches/test_packed_megatron.py",
    ),
    "the next token is another document's": Mistake(
        "patches/losses.py",
        "whole.roll(-1, dims=-1) * has_next(layout, whole.device)[0]",
        "whole.roll(-1, dims=-1)",
        "patches/test_packed_megatron.py",
    ),
    "documents of another micro-batch": Mistake(
        "patches/stages.py", "self._of_parts[part].popleft()", "self._of_parts[part].pop()", "patches/test_stages.py"
    ),
    "sink added once a step": Mistake(
        "attention/ring.py",
        "merged.merge(result, queries.back, heads)",
        "merged.merge(with_sinks(result, terms.sinks), queries.back, heads)",
        "attention/test_terms.py",
    ),
    "bias rows of another rank": Mistake(
        "attention/ulysses.py",
        "_ScatterHeads.apply(self._exchange(order, heads), bias)",
        "_ScatterHeads.apply(self._exchange(order, heads), bias.flip(2))",
        "attention/test_terms.py",
    ),
    "ALiBi in columns without its rows": Mistake(
        "kernels/alibi.py", "lse - _of_rows(terms), state", "lse, state", "kernels/test_alibi_in_columns.py"
    ),
    "the largest score is another document's": Mistake(
        "kernels/reference.py",
        "    if terms.segments is not None:\n        queries_end",
        "    if False:\n        queries_end",
        "attention/test_largest.py",
    ),
    "a triangle is left out beside a bias": Mistake(
        "kernels/cuda.py", "if terms.window == TRIANGLE else seen\n", "if False else seen\n", "kernels/test_terms.py"
    ),
    "ALiBi without the distance": Mistake(
        "kernels/bias.py",
        "(queries[:, None, :, None] - keys[:, None, None, :]).abs()",
        "((queries - queries[:, :1])[:, None, :, None] - (keys - keys[:, :1])[:, None, None, :]).abs()",
        "attention/test_terms.py",
    ),
    "dropout by local position": Mistake(
        "attention/terms.py",
        "first = plan.starts[run.sample, run.document] + run.position",
        "first = run.start",
        "attention/test_terms.py",
    ),
    "dropout scaled twice": Mistake(
        "kernels/reference.py",
        "/ (1.0 - terms.dropout.rate)",
        "/ (1.0 - terms.dropout.rate) ** 2",
        "attention/test_terms.py",
    ),
    "softcap after the mask": Mistake(
        "kernels/reference.py",
        "scores.masked_fill(~visible, -torch.inf), softcapped)",
        "scores.masked_fill(~visible, -(terms.softcap or torch.inf)), softcapped)",
        "attention/test_terms.py",
    ),
    "a repeated head's gradient counted twice": Mistake(
        "attention/repeated_heads.py",
        "x.device), x.to(total.dtype))",
        "x.device), 2 * x.to(total.dtype))",
        "attention/test_terms.py",
    ),
    "a round by distance": Mistake(
        "rounds.py", "    radices = _prime_factors(size)\n", "    radices = [size]\n", "test_rounds.py"
    ),
    "weights' gradients not summed over depth": Mistake(
        "tensor_parallel/products.py",
        "        dweight = _summed(_outer(dy, x), mesh, plan.gathered_weight)\n"
        "        return Gradients(dx, raw_reduce(dweight, mesh, plan.shared_weight))",
        "        dweight = _summed(_outer(dy, x), mesh, plan.gathered_weight)\n        return Gradients(dx, dweight)",
        "tensor_parallel/test_linear.py",
    ),
    "a bias's gradient from this rank's rows alone": Mistake(
        "tensor_parallel/products.py",
        "if axis in layouts.output.rows),",
        "if axis in layouts.output.rows and axis not in layouts.input.features),",
        "tensor_parallel/test_linear.py",
    ),
    "the last slice is not received": Mistake(
        "tensor_parallel/products.py",
        '        """Of all slices."""\n        self._receive()\n',
        '        """Of all slices."""\n',
        "tensor_parallel/test_linear.py",
    ),
    "a tied table's gradient from its own batch alone": Mistake(
        "tensor_parallel/vocabulary.py",
        "table = share(self.weight, mesh, plan.shared_weight)",
        "table = self.weight",
        "tensor_parallel/test_gated_and_tied.py",
    ),
    "a gate for the value": Mistake(
        "tensor_parallel/block.py",
        "gate, value = apply_together([self.gate, self.fc1], x)",
        "value, gate = apply_together([self.gate, self.fc1], x)",
        "tensor_parallel/test_gated_and_tied.py",
    ),
    "autocast forgotten": Mistake(
        "tensor_parallel/linear.py",
        "local, *cast = in_autocast(x.local, *weights, *biases)",
        "local, *cast = x.local, *weights, *biases",
        "tensor_parallel/test_autocast.py",
    ),
    "patch not restored": Mistake("patching.py", "            self._applied[patch].undo()\n", "", "test_patching.py"),
    "a tile of queries that travel keeps its window": Mistake(
        "program/transposed.py",
        "left=tile.right, right=tile.left",
        "left=tile.left, right=tile.right",
        "test_transposed.py",
    ),
    "a state of NaN counts": Mistake(
        "inference/states.py", "return lse.where(lse < torch.inf, -torch.inf)", "return lse", "inference"
    ),
    "base 2 taken for e": Mistake(
        "inference/states.py", "(torch.exp2, torch.log2)", "(torch.exp, torch.log)", "inference"
    ),
    "key heads of another rank": Mistake(
        "inference/decode.py", "groups = slice(begin // reads,", "groups = slice(0 * begin,", "inference"
    ),
    "a recomputation's draw is counted": Mistake(
        "patches/dropout.py",
        "states: dict[str, Any] = get_cuda_rng_tracker().states_",
        'states: dict[str, Any] = self.__dict__.setdefault("states", {})',
        "patches/test_dropout.py",
    ),
    "the count of draws is changed in a checkpoint's hands": Mistake(
        "patches/dropout.py",
        "states[name] = torch.tensor(drawn + 1, dtype=torch.int64)",
        "states.setdefault(name, torch.zeros((), dtype=torch.int64)).add_(1)",
        "patches/test_dropout.py",
    ),
    "all micro-batches draw alike": Mistake(
        "patches/dropout.py", "torch.tensor(drawn + 1,", "torch.tensor(drawn,", "patches/test_dropout.py"
    ),
    "the output of another call of the checkpoint": Mistake(
        "attention/recomputation.py",
        "record = _Record(self._current)",
        "record = next(iter(self._records), None) or _Record(self._current)",
        "attention/test_recomputation.py",
    ),
    "the last output of a checkpoint first": Mistake(
        "attention/recomputation.py",
        "self._found.popleft()[1]",
        "self._found.pop()[1]",
        "attention/test_recomputation.py",
    ),
    "an output that was made for another case": Mistake(
        "attention/recomputation.py",
        "if self._found and self._found[0][0] == case:",
        "if self._found:",
        "attention/test_recomputation.py",
    ),
    "the kept K/V of another layer": Mistake(
        "attention/ring.py",
        "*tensors, *played.kept.values())",
        "*tensors, *ring_call.plan.once((ring.communicators, *played.kept), lambda: tuple(played.kept.values())))",
        "attention/test_kept.py",
    ),
    "half keeps the values": Mistake(
        "attention/build.py", '"half": KV.KEYS', '"half": KV.VALUES', "attention/test_kept.py"
    ),
    "what is kept travels, and not the rest": Mistake(
        "program/transports.py",
        "carries = KV.BOTH & ~kept",
        "carries = kept if kept in (KV.KEYS, KV.VALUES) else KV.BOTH & ~kept",
        "attention/test_kept.py",
    ),
    "keys travel for values": Mistake(
        "attention/blocks.py",
        "((self.k, KV.KEYS), (self.v, KV.VALUES))",
        "((self.v, KV.KEYS), (self.k, KV.VALUES))",
        "attention/test_every_plan.py",
    ),
    "a latent's gradient added twice": Mistake(
        "attention/latent.py",
        "total.add(more, partial.place(block.tokens))",
        "total.add(2 * more, partial.place(block.tokens))",
        "attention/test_latent.py",
    ),
    "a latent's weights get their gradient twice": Mistake(
        "attention/latent.py",
        "        self._add(wanted[1:])\n",
        "        self._add(wanted[1:])\n        self._add(wanted[1:])\n",
        "attention/test_latent.py",
    ),
    "a latent's gradient is of the own heads": Mistake(
        "patches/latent_travel.py",
        "copied: Tensor = copy_to_tensor_model_parallel_region(latent, group=layer.tp_group)",
        "copied: Tensor = latent",
        "system_tests/test_blocks.py",
    ),
    "layers are counted from 0": Mistake(
        "patches/attention.py",
        'config.keeps_in(named["layer_number"])',
        'config.keeps_in(named["layer_number"] + 1)',
        "system_tests/test_blocks.py",
    ),
    "Megatron's checkpoint keeps no output": Mistake(
        "patches/recomputation.py",
        "plugin.recomputation.around(call.original) if keeps else call.original",
        "call.original",
        "system_tests/test_blocks.py",
    ),
}


def first_failure(mistake: Mistake, copy: Path) -> str | None:
    """The first test that fails with the mistake in a copy of the checkout, and how; None where all pass."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    file = copy / "mindspeed_cp" / mistake.file
    text = file.read_text()
    if text.count(mistake.right) != 1:
        raise SystemExit(f"error: {mistake.file} has not one place with {mistake.right!r}; plant it anew.")
    file.write_text(text.replace(mistake.right, mistake.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    kind = "" if mistake.tests.startswith("system_tests/") else "unit_tests/"
    tests = f"tests_extend/{kind}{mistake.tests}"
    done = subprocess.run([*command, tests], cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"error: pytest ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found = re.search(r"^FAILED \S*?::(.*)", done.stdout, re.MULTILINE)
    return found[1] if found else None


def main() -> int:
    """Read the command line and plant; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="mistake", help=f"{', '.join(MISTAKES)} (all)")
    names = parser.parse_args().names or list(MISTAKES)
    if unknown := [name for name in names if name not in MISTAKES]:
        parser.error(f"there is no mistake {', '.join(unknown)}; there are {', '.join(MISTAKES)}.")
    missed = 0
    for name in names:
        with tempfile.TemporaryDirectory(prefix="planted_") as folder:
            failure = first_failure(MISTAKES[name], Path(folder))
        print(f"{name}: {f'caught by {failure}' if failure else 'NOT CAUGHT'}", flush=True)
        missed += failure is None
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
