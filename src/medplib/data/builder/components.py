"""Connected parts of a mask, in numpy alone. H, W height and width, R runs of foreground pixels in a row."""

from __future__ import annotations

import numpy as np


def component_sizes(mask: np.ndarray) -> list[int]:
    """Pixels of each 8-connected part of a bool (H, W) mask, largest first.

    Runs of each row are joined with the runs they touch in the row above (union-find), so the cost grows with
    the number of runs and not with the shape of the parts.
    """
    padded = np.pad(mask.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(padded, axis=1)  # (H, W + 1): 1 where a run starts, -1 after its end
    rows, starts = np.nonzero(steps == 1)  # (R,) each, in reading order
    ends = np.nonzero(steps == -1)[1]  # (R,)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # the first run that may touch the current one
    for i in range(len(rows)):
        while rows[above] < rows[i] - 1 or (rows[above] == rows[i] - 1 and ends[above] < starts[i]):
            above += 1
        j = above
        while rows[j] == rows[i] - 1 and starts[j] <= ends[i]:  # diagonal neighbours count
            parent[root(j)] = root(i)
            j += 1
    sizes: dict[int, int] = {}
    for i, length in enumerate(ends - starts):
        sizes[root(i)] = sizes.get(root(i), 0) + int(length)
    return sorted(sizes.values(), reverse=True)
