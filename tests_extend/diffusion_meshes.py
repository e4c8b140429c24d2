"""Every mesh of 1 to 8 ranks with every family of transformers of diffusers: the largest difference from one rank.

    python tests_extend/diffusion_meshes.py [family ...]

Four guided steps each, on virtual ranks, in fp64 (1e-10 is asked for) and in fp32 (1e-5). Takes some minutes; exits
with 1 where a mesh differs by more.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests_extend")]

import torch  # noqa: E402

from unit_tests.diffusion.diffusers_cases import FAMILIES, differences  # noqa: E402
from unit_tests.diffusion.mesh_cases import MESHES, ODD_MESHES  # noqa: E402

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def main() -> int:
    """Print the table; the exit status."""
    torch.set_num_threads(1)
    names, meshes, failed = sys.argv[1:] or list(FAMILIES), (*MESHES, *ODD_MESHES), False
    rows = {str(shape): [f"{shape}"] for shape in meshes}
    for name in names:
        for dtype, tolerance in TOLERANCES.items():
            for shape, difference in differences(name, meshes, dtype):
                rows[str(shape)].append(f"{difference:.0e}")
                failed |= not difference < tolerance
            print(f"{name}, {dtype}: done", file=sys.stderr, flush=True)
    print("| mesh | " + " | ".join(f"{name} fp64 | fp32" for name in names) + " |")
    print("|---" * (1 + 2 * len(names)) + "|")
    for cells in rows.values():
        print("| " + " | ".join(cells) + " |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
