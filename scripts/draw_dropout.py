"""Draw the losses of a small GPT with attention dropout at CP 1, 2 and 4, for docs/attention.md.

python scripts/draw_dropout.py [--steps 60] [--output docs/images/dropout_losses.png]
"""

import argparse
from pathlib import Path

from mindspeed_cp.testing.dropout_losses import CONFIGS, train

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "dropout_losses.png"
RATE = 0.1
SMALLEST = 1e-17


def main() -> None:
    """Read the command line, train, say how far apart the losses are, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    losses = {name: train(config, args.steps, rate=RATE) for name, config in CONFIGS.items()}
    losses["CP 1, no dropout"] = train(CONFIGS["CP 1"], args.steps, rate=0.0)
    apart = {name: [abs(a - b) for a, b in zip(values, losses["CP 1"], strict=True)] for name, values in losses.items()}
    for name, values in losses.items():
        print(f"{name}: last loss {values[-1]:.6f}, at most {max(apart[name]):.1e} from CP 1")
    draw(losses, apart, args.output)


def draw(losses: dict[str, list[float]], apart: dict[str, list[float]], output: Path) -> None:
    """One curve upon another, each narrower than the one below, and how far they are apart. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for width, style, name in zip((6, 3, 1, 1), ("-", "-", "-", "k:"), losses, strict=True):
        left.plot(losses[name], style, linewidth=width, label=name)
        right.semilogy([max(value, SMALLEST) for value in apart[name]], style, linewidth=width)
    left.set(xlabel="step", ylabel="loss", title=f"Attention dropout {RATE}")
    right.set(xlabel="step", ylabel="difference from CP 1", title=f"fp64; {SMALLEST:g} is none")
    left.legend()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
