"""Draws docs/neighborhood.svg, the README's picture, from the definition in natcore.reference.

python docs/draw_neighborhood.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from natcore import Window, reference

SIDE, CELL, GAP, TOP = 15, 12, 28, 46
PANELS = (  # title, query, options of the window
    ("in the middle", (7, 6), {}),
    ("in a corner", (1, 13), {}),
    ("dilation 2", (7, 6), {"dilation": 2}),
    ("causal on both axes", (7, 6), {"is_causal": True}),
)
KERNEL = 7


def panel(query: tuple[int, int], options: dict, left: int) -> list[str]:
    """The cells of one map: keys that the query sees, the query itself, and the rest."""
    window = Window.of(2, KERNEL, **options)
    mask = reference.window_mask(window, (SIDE, SIDE))[query[0] * SIDE + query[1]].reshape(SIDE, SIDE)
    cells = []
    for row, column in np.ndindex(SIDE, SIDE):
        fill = "#d1495b" if (row, column) == query else "#2e6f95" if mask[row, column] else "#e4e7eb"
        x, y = left + column * CELL, TOP + row * CELL
        cells.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>')
    return cells


def picture() -> str:
    """The whole SVG."""
    width, height = GAP + len(PANELS) * (SIDE * CELL + GAP), TOP + SIDE * CELL + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, query, options) in enumerate(PANELS):
        left = GAP + i * (SIDE * CELL + GAP)
        lines.append(f'<text x="{left}" y="{TOP - 14}" font-size="15" fill="#1f2933">{title}</text>')
        lines += panel(query, options, left)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).with_name("neighborhood.svg")
    path.write_text(picture(), encoding="utf-8")
    print(path)
