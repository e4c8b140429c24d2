"""What each form of latent attention sends and computes, against numbers written by hand; DeepSeek's head sizes."""

import pytest

from mindspeed_cp.planner import LatentPass, LatentShape, Network, predicted_bytes, predicted_seconds
from mindspeed_cp.program import Phase
from mindspeed_cp.topology import CPTopology

HEADS, TOKENS = 16, 4096
RING, ULYSSES = CPTopology(inner=4), CPTopology(ulysses=4)
# Numbers of a token: in a ring, forward; and under Ulysses to one rank, both ways.
WIDTH = {
    "expanded": (HEADS * (192 + 128), HEADS // 4 * (192 + 192 + 128 + 128)),
    "latent": (576, HEADS // 4 * (192 + 128) + 576),
    "absorbed": (576, HEADS // 4 * (576 + 512) + 576),
}


def shape(form: str, tokens: int = TOKENS) -> LatentShape:
    return LatentShape(num_tokens=tokens, num_heads=HEADS, num_kv_heads=HEADS, head_size=192, form=form)


@pytest.mark.parametrize("form", WIDTH)
def test_a_form_sends_its_numbers(form):
    in_ring, to_one = WIDTH[form]
    forward = LatentPass(shape(form), RING, Phase.FORWARD, 1.0).attention
    assert forward.num_bytes() == (4 * 3 - 1.5) * TOKENS // 4 * in_ring * 2
    network = Network(num_ranks=4, ranks_per_node=4, fast_mbit=8.0, slow_mbit=8.0)
    for phase in Phase:
        of_ulysses = LatentPass(shape(form), ULYSSES, phase, 1.0)
        assert of_ulysses.attention.num_bytes() == 4 * 3 * TOKENS // 4 * to_one * 2
        sent = [sum(predicted_bytes(network, of_ulysses.events(rank), rank)) for rank in range(4)]
        assert sum(sent) == of_ulysses.attention.num_bytes()


def test_a_form_computes_its_products():
    scores = TOKENS**2 // 2
    by_form = {
        "expanded": (320, 3 * 192 + 2 * 128, 0, 1),
        "latent": (320, 3 * 192 + 2 * 128, 3, 0),
        "absorbed": (576 + 512, 3 * 576 + 2 * 512, 0, 1),
    }
    # On one rank a causal pass sees all keys once.
    for form, (forward, backward, again, own) in by_form.items():
        for phase, products, times in ((Phase.FORWARD, forward, (again + 2) // 3), (Phase.BACKWARD, backward, again)):
            around = own * (1 if phase is Phase.FORWARD else 2)
            making = 2 * TOKENS * HEADS * 512 * 256 * (times + around)
            alone = LatentPass(shape(form), CPTopology(), phase, 1e9)
            network = Network(num_ranks=1, ranks_per_node=1, fast_mbit=8.0, slow_mbit=8.0)
            diagonal = TOKENS * 2 * HEADS * products / 2
            flops = 1e9 * predicted_seconds(network, alone.events)
            assert flops == pytest.approx(2 * scores * HEADS * products + diagonal + making, rel=1e-9)
