"""Makes the pictures of the README and the docs: the SVG files, and with Chromium on the path those of the graph page.

python docs/images/make_images.py [--svg-only]
"""

from __future__ import annotations

import sys
from pathlib import Path

import architecture
import badges
import graph_page
import measured
import token_times
from svg import THEMES

HERE = Path(__file__).parent
DRAWINGS = {
    "architecture": architecture.draw,
    "token-times": token_times.draw,
    **({"measured": measured.draw} if measured.has_comparison() else {}),
}


def svg_files() -> dict[Path, str]:
    """The text of every SVG file of this folder."""
    files = {HERE / f"{name}-{theme}.svg": draw(theme) for name, draw in DRAWINGS.items() for theme in THEMES}
    return files | {HERE / f"badge-{name}.svg": badges.draw(name) for name in badges.BADGES}


def main() -> None:
    for path, text in svg_files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    if "--svg-only" not in sys.argv:
        graph_page.main()


if __name__ == "__main__":
    main()
