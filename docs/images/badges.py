"""Draws the badges of the README, one for each fact that `make test` proves."""

from __future__ import annotations

from svg import Drawing

# File name -> label, value, width of the label and of the value.
BADGES = {
    "types": ("types", "mypy strict", 44, 76),
    "generated": ("generated code", "no drift", 102, 60),
    "style": ("style", "ruff, clang-format", 42, 112),
}
HEIGHT = 20


def draw(name: str) -> str:
    """The badge as SVG text; the same in both themes."""
    label, value, left, right = BADGES[name]
    d = Drawing(left + right, HEIGHT, "light")
    d.parts.append(f'<rect width="{left + right}" height="{HEIGHT}" rx="4" fill="#555"/>')
    d.parts.append(f'<path d="M{left} 0h{right - 4}a4 4 0 0 1 4 4v12a4 4 0 0 1-4 4h-{right - 4}z" fill="#2563c9"/>')
    for text, centre in ((label, left / 2), (value, left + right / 2)):
        d.parts.append(
            f'<text x="{centre:g}" y="14" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" fill="#fff"'
            f' text-anchor="middle">{text}</text>'
        )
    return d.render(f"{label}: {value}")
