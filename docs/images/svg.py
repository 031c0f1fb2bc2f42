"""SVG text, boxes and arrows in a light and a dark theme, for the pictures of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

SANS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# The colours of the graph page (runtime/inspect/page.css) and of GitHub's two themes.
THEMES = {
    "light": {
        "text": "#1f2328", "soft": "#59636e", "line": "#d0d7de", "card": "#f6f8fa", "edge": "#818b98",
        "orange": "#c2571a", "blue": "#2563c9", "purple": "#6f42c1", "green": "#25803c", "teal": "#0b7f83",
    },
    "dark": {
        "text": "#f0f6fc", "soft": "#9198a1", "line": "#3d444d", "card": "#151b23", "edge": "#7d8590",
        "orange": "#f0935a", "blue": "#6ea3f7", "purple": "#b794f4", "green": "#63c47b", "teal": "#4cc4c8",
    },
}  # fmt: skip


@dataclass(slots=True)
class Drawing:
    """An SVG picture under construction; colours are names of the theme."""

    width: int
    height: int
    theme: str
    parts: list[str] = field(default_factory=list)

    def colour(self, name: str) -> str:
        return THEMES[self.theme][name]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        colour: str = "text",
        bold: bool = False,
        mono: bool = False,
        anchor: str = "start",
    ) -> None:
        family, weight = (MONO if mono else SANS), (' font-weight="600"' if bold else "")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size:g}"{weight}'
            f' fill="{self.colour(colour)}" text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        stroke: str = "line",
        fill: str | None = "card",
        dashed: bool = False,
        radius: float = 8,
    ) -> None:
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        paint = self.colour(fill) if fill else "none"
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
            f' fill="{paint}" stroke="{self.colour(stroke)}" stroke-width="1.4"{dashes}/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
            f' fill="{self.colour(colour)}" opacity="{opacity:g}"/>'
        )

    def line(self, *points: tuple[float, float], colour: str = "edge", width: float = 1.5, arrow: bool = False) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="{self.colour(colour)}" stroke-width="{width:g}"'
            f' stroke-linejoin="round"{end}/>'
        )

    def render(self, description: str) -> str:
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{self.colour("edge")}"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}"'
            f' viewBox="0 0 {self.width} {self.height}" role="img">'
        )
        title = f"<title>{escape(description)}</title>"
        has_arrows = any("#arrow" in part for part in self.parts)
        return "\n".join([head, title, *([arrow] if has_arrows else []), *self.parts, "</svg>\n"])
