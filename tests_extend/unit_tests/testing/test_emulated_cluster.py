"""The emulated cluster: rates, counters, and that nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from mindspeed_cp.planner import Network
from mindspeed_cp.testing import emulated_cluster
from mindspeed_cp.testing.emulated_cluster import Cluster, link_bytes, measure_link, transfer_rate, why_not_here
from mindspeed_cp.testing.rank_pool import LIMIT_S, RankFailure

needs_root = pytest.mark.skipif(why_not_here() is not None, reason=f"no emulated cluster here: {why_not_here()}")

HELD = """
import os, time
from mindspeed_cp.planner import Network
from mindspeed_cp.testing.emulated_cluster import Cluster

if __name__ == "__main__":
    with Cluster(Network(num_ranks=2, ranks_per_node=1, fast_mbit=100, slow_mbit=100)) as cluster:
        cluster.call(os.getpid)  # Starts the ranks.
        print(*cluster.namespaces, flush=True)
        cluster.call(time.sleep, 600)
"""


def network(**options: object) -> Network:
    return Network(**{"num_ranks": 4, "ranks_per_node": 2, "fast_mbit": 400.0, "slow_mbit": 40.0, **options})


def holders(namespaces: tuple[int, ...]) -> set[str]:
    """Whatever keeps one of the namespaces alive: processes in it, open files, mounts."""
    found = set()
    for link in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("net:[") and int(target[5:-1]) in namespaces:
            found.add(str(link))
    mounts = Path("/proc/self/mountinfo").read_text()
    return found | {str(number) for number in namespaces if f"net:[{number}]" in mounts}


def assert_gone(namespaces: tuple[int, ...]) -> None:
    assert namespaces
    deadline = time.monotonic() + LIMIT_S
    while (left := holders(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def reaches(cluster: Cluster, source: int, to: int, mbit: float) -> bool:
    """Whether the link gets as fast as that in one of many tries: on a busy machine most may be slower."""
    return any(measure_link(cluster, source, to, 0.5) > mbit for _ in range(20))


def own_links() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


@needs_root
def test_cluster_keeps_to_the_set_rates_and_leaves_nothing():
    links_before = own_links()
    with Cluster(network()) as cluster:
        namespaces = cluster.namespaces
        assert len(namespaces) == 5 and holders(namespaces)
        inside, between = measure_link(cluster, 0, 1, 0.5), measure_link(cluster, 1, 2, 0.5)
        assert inside < 1.1 * 400 and reaches(cluster, 0, 1, 0.3 * 400)
        assert between < 1.1 * 40 and reaches(cluster, 1, 2, 0.3 * 40)
        cluster.set_slow_rate(80)
        assert measure_link(cluster, 3, 0, 0.5) < 1.1 * 80 and reaches(cluster, 3, 0, 1.1 * 40)
        before = cluster.call(link_bytes)
        cluster.call(transfer_rate, 1, 3, 1_000_000)
        after = cluster.call(link_bytes)
        assert 1_000_000 < after[1].between - before[1].between < 1_050_000
        assert after[1].inside - before[1].inside < 50_000
        assert own_links() == links_before
    assert_gone(namespaces)
    assert own_links() == links_before


@needs_root
def test_nodes_can_share_one_slow_link():
    with Cluster(network(slow_link="node")) as cluster:
        assert measure_link(cluster, 0, 3, 0.5) < 1.1 * 40 and reaches(cluster, 0, 3, 0.3 * 40)
        assert reaches(cluster, 2, 3, 2 * 40)


@needs_root
def test_cluster_is_gone_after_an_exception():
    with pytest.raises(ZeroDivisionError), Cluster(network(num_ranks=2)) as cluster:
        namespaces = cluster.namespaces
        cluster.call(dist.barrier)
        raise ZeroDivisionError
    assert_gone(namespaces)


@needs_root
def test_cluster_is_gone_after_a_rank_was_killed():
    with pytest.raises(RankFailure, match="died with exit code -9"), Cluster(network(num_ranks=2)) as cluster:
        namespaces = cluster.namespaces
        os.kill(cluster.call(os.getpid)[1], signal.SIGKILL)
        cluster.call(dist.barrier)
    assert_gone(namespaces)


@needs_root
def test_cluster_is_gone_after_its_process_was_killed_in_the_middle_of_work(tmp_path):
    script = tmp_path / "held.py"
    script.write_text(HELD)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        namespaces = tuple(map(int, process.stdout.readline().split()))
        process.kill()
    assert_gone(namespaces)


@needs_root
def test_network_that_cannot_be_built_is_an_error_and_leaves_nothing():
    made: list[int] = []

    def run(self, program, commands):
        made.append(Path(self.path).stat().st_ino)
        raise OSError("no such device")

    refusing = mock.patch.object(emulated_cluster._Namespace, "run", run)
    possible = mock.patch.object(emulated_cluster, "why_not_here", lambda: None)
    with refusing, possible, pytest.raises(OSError, match="no such device"):
        Cluster(network())
    assert_gone(tuple(made))


def test_ranks_on_plain_loopback_have_no_cards_of_their_own():
    with Cluster(network(num_ranks=2), emulated=False) as cluster:
        assert cluster.namespaces == ()
        assert cluster.call(link_bytes) == [(0, 0), (0, 0)]
        assert measure_link(cluster, 0, 1, 0.01) > 0
        cluster.set_slow_rate(10)
        assert cluster.network.slow_mbit == 10


def test_cluster_without_root_is_refused_with_the_reason():
    with mock.patch.object(os, "geteuid", return_value=1000), pytest.raises(OSError, match="namespaces need root"):
        Cluster(network())


def test_cluster_without_its_programs_is_refused_with_their_package():
    with mock.patch.object(os, "geteuid", return_value=0), mock.patch.object(emulated_cluster, "which", lambda _: None):
        assert why_not_here() == "ip, tc, nsenter not found (Debian and Ubuntu: packages iproute2 and util-linux)."


def test_container_whose_root_may_not_make_namespaces_is_told_apart():
    refusal = mock.patch.object(emulated_cluster, "_call_libc", side_effect=PermissionError("unshare: not permitted"))
    with mock.patch.object(os, "geteuid", return_value=0), mock.patch.object(emulated_cluster, "which", str), refusal:
        assert why_not_here() == "unshare: not permitted"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_ranks": 3}, "3 ranks do not fill nodes of 2"), ({"slow_mbit": 0.0}, "a link of 0.0 Mbit/s")],
)
def test_network_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
