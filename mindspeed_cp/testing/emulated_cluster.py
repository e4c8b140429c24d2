"""A cluster on one machine: each rank in a network namespace of its own, over links of a set rate.

`scripts/emulated_cluster.py` builds one and measures what two ranks really get inside a node and between nodes. Needs
root and the programs ip, tc and nsenter; processor and memory stay those of the machine.

Note [Wiring]
    Each rank has two network cards. `fast` leads to its node's bridge, `slow` to the bridge between the nodes, and both
    are limited in both directions (tbf). gloo binds one address a rank, so the address is on `fast`, and a route for
    each peer says which card leads there:

        rank 0 --fast-- node0 --fast-- rank 1          rank 2 --fast-- node1 --fast-- rank 3
           \\slow           slow/                           \\slow           slow/
            `----------------------------- core ---------------------------'

    Where the nodes share one slow link each (slow_link="node"), the ranks' slow cards lead to a bridge of the node, and
    one limited link leads from that to the core. All bridges are in one more namespace.

Note [Nothing is left behind]
    Namespaces have no name and no mount: this process holds them open by file descriptors, and the ranks by being in
    them. The kernel removes them, and every link in them, with the last process, however it ends. The namespace that
    the machine itself uses is never touched.
"""

import argparse
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from shutil import which
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.planner.network import Network
from mindspeed_cp.testing.rank_pool import RankPool

PROGRAMS = ("ip", "tc", "nsenter")
MTU = 9000
"""Large frames: of what the counters and the rates see, less than 1 % is headers."""

COLLECTIVE_TIMEOUT = timedelta(seconds=300)
_CLONE_NEWNET = 0x40000000


class LinkBytes(NamedTuple):
    """What has left a rank over its cards, headers and acknowledgements included."""

    inside: int
    between: int


def why_not_here() -> str | None:
    """Why this machine cannot emulate a cluster, in a sentence; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root."
    if missing := [program for program in PROGRAMS if which(program) is None]:
        return f"{', '.join(missing)} not found (Debian and Ubuntu: packages iproute2 and util-linux)."
    try:
        with contextlib.closing(_Namespace()) as trial:
            trial.run("ip", ["link add core type bridge", "link add fast type veth peer name fast0 master core"])
            trial.run("tc", [_limit("fast", 1000)])
    except OSError as error:
        # A container's root, or a kernel without one of them.
        return str(error)
    return None


class Cluster:
    """Ranks that run what they are sent, each as if on a machine of its own; or over plain loopback.

    network: how they are wired. emulated: False is plain loopback, where the rates mean nothing.
    preload: modules that the ranks have imported from the start.

    A context manager; raises OSError where the machine cannot do it, see `why_not_here`.
    """

    def __init__(self, network: Network, *, emulated: bool = True, preload: Sequence[str] = ("torch",)) -> None:
        if emulated and (reason := why_not_here()):
            raise OSError(f"no cluster can be emulated here: {reason}")
        self.network = network
        self._namespaces: list[_Namespace] = []
        try:
            if emulated:
                self._wire()
            paths = [namespace.path for namespace in self._namespaces[1:]]
            self.pool = RankPool(network.num_ranks, preload, functools.partial(_join, network.num_ranks, paths))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.close()

    @property
    def namespaces(self) -> tuple[int, ...]:
        """Inode numbers of the namespaces, as lsns lists them; none on plain loopback."""
        return tuple(Path(namespace.path).stat().st_ino for namespace in self._namespaces)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 600.0) -> list[Any]:
        """What `function(*args)` returns on each rank; see RankPool.call."""
        return self.pool.call(range(self.network.num_ranks), timeout_s, function, *args)

    def set_slow_rate(self, slow_mbit: float) -> None:
        """Change the rate of the links between nodes."""
        self.network = replace(self.network, slow_mbit=slow_mbit)
        if self._namespaces:
            hub, *ranks = self._namespaces
            hub.run("tc", [_limit(card, slow_mbit) for card in self._slow_cards_in_hub()])
            if self.network.slow_link == "rank":
                for namespace in ranks:
                    namespace.run("tc", [_limit("slow", slow_mbit)])

    def close(self) -> None:
        """Let go of the namespaces; see Note [Nothing is left behind]."""
        for namespace in self._namespaces:
            namespace.close()
        self._namespaces = []

    def _slow_cards_in_hub(self) -> list[str]:
        if self.network.slow_link == "rank":
            return [f"slow{rank}" for rank in range(self.network.num_ranks)]
        return [f"{end}{node}" for node in range(self.network.num_nodes) for end in ("up", "down")]

    def _wire(self) -> None:
        """Make the namespaces and everything in them: see Note [Wiring]."""
        network = self.network
        hub = _Namespace()
        self._namespaces.append(hub)
        bridges = ["core", *(f"node{node}" for node in range(network.num_nodes))]
        links: list[str] = []
        if network.slow_link == "node":
            for node in range(network.num_nodes):
                bridges.append(f"rack{node}")
                links += [
                    f"link add up{node} mtu {MTU} type veth peer name down{node} mtu {MTU}",
                    f"link set up{node} master rack{node} up",
                    f"link set down{node} master core up",
                ]
        made = [f"link add {bridge} mtu {MTU} type bridge" for bridge in bridges]
        hub.run("ip", [*made, *(f"link set {bridge} up" for bridge in bridges), *links])
        for rank in range(network.num_ranks):
            self._namespaces.append(_Namespace())
            self._wire_rank(hub, self._namespaces[-1], rank)
        hub.run("tc", [_limit(f"fast{rank}", network.fast_mbit) for rank in range(network.num_ranks)])
        for namespace in self._namespaces[1:]:
            namespace.run("tc", [_limit("fast", network.fast_mbit)])
        self.set_slow_rate(network.slow_mbit)

    def _wire_rank(self, hub: "_Namespace", own: "_Namespace", rank: int) -> None:
        network, node = self.network, self.network.node(rank)
        out = "core" if network.slow_link == "rank" else f"rack{node}"
        cards = {"fast": f"node{node}", "slow": out}
        own.run(
            "ip",
            [
                "link set lo up",
                *(f"link add {card} mtu {MTU} type veth peer name {card}{rank} netns {hub.path}" for card in cards),
                *(f"link set {card} up" for card in cards),
                # Two such pieces of each connection may wait in a card, and gloo's ready messages behind them.
                f"link set slow gso_max_size {2 * MTU}",
                f"addr add {_address(rank)}/32 dev fast",
                # Nothing is lost: a late acknowledgement stands in a queue, and sending again would lengthen that.
                *(
                    f"route add {_address(peer)}/32 dev {'fast' if network.node(peer) == node else 'slow'} "
                    f"src {_address(rank)} rto_min 10s"
                    for peer in range(network.num_ranks)
                    if peer != rank
                ),
            ],
        )
        # A large frame of a bridge's port is set there, too.
        hub.run("ip", [f"link set {card}{rank} mtu {MTU} master {bridge} up" for card, bridge in cards.items()])


class _Namespace:
    """A network namespace that lives as long as somebody has it open, or is in it."""

    def __init__(self) -> None:
        # Which namespace a thread is in is its own affair: one that ends leaves no trace in this process.
        with ThreadPoolExecutor(1) as thread:
            self._file = thread.submit(self._make).result()

    @staticmethod
    def _make() -> int:
        _call_libc("unshare", _CLONE_NEWNET)
        for setting, value in {
            # Else the kernel sends messages of its own, which the counters would count.
            "ipv6/conf/all/disable_ipv6": "1",
            "ipv6/conf/default/disable_ipv6": "1",
            # A step of a ring starts at full rate, as on a network without TCP.
            "ipv4/tcp_slow_start_after_idle": "0",
            # Nothing is ever lost, so this one sends as much as its buffer allows. Small buffers keep queues short: in
            # long ones acknowledgements and gloo's ready messages wait, and links stand idle.
            "ipv4/tcp_congestion_control": "reno",
            "ipv4/tcp_wmem": "4096 16384 131072",
        }.items():
            Path("/proc/sys/net", setting).write_text(value)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """By which other processes open it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def run(self, program: Literal["ip", "tc"], commands: Sequence[str]) -> None:
        """Run `commands` of ip or tc within. Raises OSError with what went wrong."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", program, "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(f"{program} could not build the network: {done.stderr.strip()}\n" + "\n".join(commands))

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)


def _limit(card: str, mbit: float) -> str:
    """tc's command that limits what leaves over a card.

    A bucket of a millisecond keeps to the rate also in short transfers. What waits is bounded by the senders' buffers,
    not by the queue: nothing is dropped, as on the lossless networks of training clusters.
    """
    burst = max(2 * MTU, int(mbit * 1e6 / 8 * 1e-3))
    return f"qdisc replace dev {card} root tbf rate {round(mbit * 1e6)}bit burst {burst} limit {1 << 30}"


def _address(rank: int) -> str:
    return f"10.77.{rank // 250}.{rank % 250 + 1}"


def _call_libc(function: str, *args: int) -> None:
    """Call one of the C library's functions that Python has only since 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


def _join(world_size: int, namespaces: Sequence[str], rank: int, folder: str) -> None:
    """In a rank's process: go into its namespace and join the others."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if namespaces:
        file = os.open(namespaces[rank], os.O_RDONLY | os.O_CLOEXEC)
        _call_libc("setns", file, _CLONE_NEWNET)
        os.close(file)
        os.environ["GLOO_SOCKET_IFNAME"] = "fast"
    dist.init_process_group("gloo", f"file://{folder}/store", COLLECTIVE_TIMEOUT, world_size, rank)


def _end_with_parent() -> None:
    """A rank that waits for a peer does not read its connection, and would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def link_bytes() -> LinkBytes:
    """In a rank's process: what has left it so far. Zeros where it has no cards of its own."""
    sent = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        card, counters = line.split(":")
        sent[card.strip()] = int(counters.split()[8])
    return LinkBytes(sent.get("fast", 0), sent.get("slow", 0))


def transfer_rate(source: int, to: int, num_bytes: int) -> float | None:
    """In every rank's process: the rate in Mbit/s at which `to` receives from `source`; None on the others."""
    rank, message = dist.get_rank(), torch.ones(num_bytes, dtype=torch.uint8)
    dist.barrier()
    # A first small one, as the acknowledgement of the large one is small too.
    for part in (message[:1], message):
        start = time.perf_counter()
        if rank == source:
            dist.send(part, to)
        elif rank == to:
            dist.recv(part, source)
    return num_bytes * 8e-6 / (time.perf_counter() - start) if rank == to else None


def measure_link(cluster: Cluster, source: int, to: int, seconds: float = 1.0) -> float:
    """What `to` gets from `source` in Mbit/s, over a transfer that should take so long."""
    network = cluster.network
    mbit = network.fast_mbit if network.node(source) == network.node(to) else network.slow_mbit
    rate = cluster.call(transfer_rate, source, to, int(mbit * 1e6 / 8 * seconds))[to]
    assert isinstance(rate, float)
    return rate


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that describe the links of a network."""
    parser.add_argument("--fast-mbit", type=float, default=4000.0, help="rate inside a node, each direction")
    parser.add_argument(
        "--slow-link",
        choices=("rank", "node"),
        default="rank",
        help="whether each rank has a link to other nodes, or each node has one for all its ranks",
    )


def network_of(args: argparse.Namespace) -> Network:
    """The network of these options, and of --ranks, --ranks-per-node and --slow-mbit."""
    return Network(
        num_ranks=args.ranks,
        ranks_per_node=args.ranks_per_node,
        fast_mbit=args.fast_mbit,
        slow_mbit=args.slow_mbit,
        slow_link=args.slow_link,
    )
