"""Compare the loss curves of two training logs of Megatron's, iteration by iteration.

    python compare_losses.py reference.log candidate.log --tolerance 1e-5 --plot losses.png

Prints both side by side with their largest relative difference. Exits with 1 where that is above the tolerance, or
where one log has iterations that the other lacks.
"""

import argparse
import math
import re
import sys
from pathlib import Path

ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ .*?lm loss: ([-+.\dEeNnAaIiFf]+)")
PRINTED = 1e-7
"""The last digit of a loss in a log, relative to it, or a part of that."""
VALIDATION = re.compile(r"validation loss at iteration\s+(\d+) \| lm loss value: ([-+.\dEeNnAaIiFf]+)")

GRADIENT_NORM = re.compile(r"iteration\s+(\d+)/\s*\d+ .*?grad norm: ([-+.\dEeNnAaIiFf]+)")


def losses_in(log: str, line: re.Pattern[str] = ITERATION) -> dict[int, float]:
    """Loss of each iteration in the text of a log, as lines of this kind have it."""
    return {int(match[1]): float(match[2]) for match in line.finditer(log)}


def relative_difference(reference: float, candidate: float) -> float:
    """|candidate - reference| / |reference|; infinite where one of them is not a number."""
    difference = abs(candidate - reference) / max(abs(reference), 1e-30)
    return float("inf") if math.isnan(difference) else difference


def largest_difference(reference: dict[int, float], candidate: dict[int, float]) -> float:
    """Largest relative difference of any iteration; infinite where the two have not the same iterations, or none."""
    if not reference or reference.keys() != candidate.keys():
        return float("inf")
    return max(relative_difference(reference[i], candidate[i]) for i in reference)


def rows_to_print(iterations: list[int], most: int = 20) -> list[int]:
    """At most about `most` of the iterations, evenly spread, the last among them."""
    stride = max(1, -(-len(iterations) // most))
    return sorted({*iterations[::stride], iterations[-1]})


def plot(curves: dict[str, dict[int, float]], image: Path) -> None:
    """Draw the curves into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
    styles = ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1.2})
    for (name, losses), style in zip(curves.items(), styles, strict=True):
        above.plot(list(losses), list(losses.values()), label=name, **style)
    reference, candidate = curves.values()
    differences = {i: relative_difference(reference[i], candidate[i]) for i in reference}
    # A log has seven digits of a loss: a smaller difference is none there.
    equal, unequal = [i for i, d in differences.items() if d == 0], {i: d for i, d in differences.items() if d > 0}
    below.set_yscale("log")
    below.plot(list(unequal), list(unequal.values()), ".", color="tab:red")
    below.plot(equal, [PRINTED] * len(equal), "|", color="tab:green", label="none in the digits that are printed")
    below.set_ylim(bottom=PRINTED / 2, top=max(1e-5, 2 * max(differences.values())))
    if equal:
        below.legend(fontsize="small")
    above.set_ylabel("lm loss")
    above.legend()
    below.set_ylabel("relative\ndifference")
    below.set_xlabel("iteration")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)


def main() -> int:
    """Read the command line, compare, print and draw; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference allowed")
    parser.add_argument("--names", nargs=2, default=None, help="what to call the two curves")
    parser.add_argument("--plot", type=Path, help="PNG to draw the curves into")
    args = parser.parse_args()

    names = args.names or (args.reference.stem, args.candidate.stem)
    reference, candidate = (losses_in(log.read_text(errors="replace")) for log in (args.reference, args.candidate))
    if not reference or reference.keys() != candidate.keys():
        print(f"{args.reference} has {len(reference)} iterations with a loss, {args.candidate} has {len(candidate)}.")
        return 1

    print(f"iteration {names[0]:>16} {names[1]:>16}   difference")
    for i in rows_to_print(list(reference)):
        difference = relative_difference(reference[i], candidate[i])
        print(f"{i:9d} {reference[i]:16.6f} {candidate[i]:16.6f}   {difference:.1e}")
    largest = largest_difference(reference, candidate)
    agree = largest <= args.tolerance
    verdict = "within" if agree else "ABOVE"
    print(f"largest relative difference {largest:.2e} over {len(reference)} iterations: {verdict} {args.tolerance:.0e}")
    if args.plot:
        try:
            plot(dict(zip(names, (reference, candidate), strict=True)), args.plot)
            print(f"drawn into {args.plot}")
        except OSError as error:
            # A full disk must not turn a run that went well into a failed one.
            print(
                f"warning: {args.plot} could not be written ({error.strerror}); the losses are in {args.reference} and "
                f"{args.candidate}.",
                file=sys.stderr,
            )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
