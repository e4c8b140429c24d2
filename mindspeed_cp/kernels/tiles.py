"""Tiles for kernels: what they do not all take is cut into rectangles and triangles, which they do."""

from collections.abc import Iterator

from mindspeed_cp.plan import Tile, within


def cut(tile: Tile) -> tuple[Tile, ...]:
    """The tile in rectangles and triangles: squares with right == 0, or left == 0 and nothing else.

    A bound that is not a diagonal of the rectangle leaves a square under its slanting edge, and rectangles beside it. A
    band with both bounds is cut into strips as high as it is wide: up to the first row's last key only left cuts, after
    it only right.
    """
    rows, keys = tile.num_queries, tile.num_keys
    if tile.left is None and tile.right is None:
        return (tile,)
    if tile.left is not None and tile.right is not None:
        return tuple(part for half in _strips(tile) for part in cut(half))
    if rows == keys and 0 in (tile.left, tile.right):
        return (tile,)
    if tile.right is not None:
        # Row a sees keys up to a + seen: those before `seen` are seen by all.
        seen = keys - rows + tile.right
        corners = (tile.queries.start + keys - seen, tile.keys.start + seen)
    else:
        # Row a sees keys from a - before on.
        before = rows - keys + (tile.left or 0)
        corners = (tile.queries.start + before, tile.keys.start + rows - before)
    row, key = corners
    return tuple(_quadrants(tile, row, key))


def _quadrants(tile: Tile, row: int, key: int) -> Iterator[Tile]:
    """The parts of a tile before and after a row and a key, each by itself."""
    for queries in (slice(tile.queries.start, row), slice(row, tile.queries.stop)):
        for keys in (slice(tile.keys.start, key), slice(key, tile.keys.stop)):
            part = within(tile, queries, keys)
            if part is not None:
                yield part


def _strips(tile: Tile) -> Iterator[Tile]:
    """Parts with one bound at most."""
    rows, keys = tile.num_queries, tile.num_keys
    assert tile.left is not None and tile.right is not None
    width = tile.left + tile.right + 1
    for start in range(0, rows, width):
        queries = slice(tile.queries.start + start, min(tile.queries.start + start + width, tile.queries.stop))
        last = tile.keys.start + start + keys - rows + tile.right  # The last key that the strip's first row sees.
        for columns in (slice(tile.keys.start, last + 1), slice(last + 1, tile.keys.stop)):
            part = within(tile, queries, columns)
            if part is not None:
                yield part
