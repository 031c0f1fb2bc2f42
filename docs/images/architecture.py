"""Draws the architecture picture of the README: what is generated from what, and what runs."""

from __future__ import annotations

from collections.abc import Sequence

from svg import Drawing

WIDTH, HEIGHT = 1120, 640
DESCRIPTION = "Architecture: specs in YAML are generated into Python, C++ and Triton, which the runtime executes"

SPECS = [
    ("ops/", "equations, operands, dims"),
    ("models/", "layouts, weights, programs"),
    ("passes/", "rewrite rules with counts"),
    ("hardware/", "peak rates, tile sizes"),
]
STEPS = [
    ("load", "YAML with positions"),
    ("link", "names, types, shapes"),
    ("check", "rules against models"),
    ("emit", "immutable model to views"),
    ("render", "templates, formatter"),
    ("write", "only files that changed"),
]
GENERATED = [
    ("ops/", "node classes, shapes, cost"),
    ("builders/", "a graph builder per model"),
    ("passes/", "rewrite rules in Python"),
    ("kernels/reference/", "torch, the oracle"),
    ("kernels/cpu/", "C++, one function per op"),
    ("kernels/triton/", "GPU kernels, launchers"),
    ("docs/ schema/ tests/", "pages, schemas, checks"),
]


def draw(theme: str) -> str:
    """The picture as SVG text."""
    d = Drawing(WIDTH, HEIGHT, theme)
    _band(d, 12, 262, "Generate time", "make generate")
    _list(d, 34, 60, 296, 196, "specs/", "facts, written once", "orange", SPECS, 38)
    _list(d, 388, 60, 272, 196, "codegen/", "no torch, no runtime", "purple", STEPS, 24.5)
    _list(d, 718, 60, 368, 196, "generated/", "committed and reviewed", "blue", GENERATED, 21.4)
    d.line((330, 158), (386, 158), arrow=True)
    d.line((660, 158), (716, 158), arrow=True)

    _band(d, 296, 332, "Run time", "LLM.generate")
    d.text(32, 462, "prompts", bold=True)
    d.line((98, 458), (122, 458), arrow=True)
    _card(d, 124, 420, 132, 76, "text/", ["tokenizer", "chat templates"], "green")
    _card(d, 298, 420, 150, 76, "engine/", ["continuous batching", "one step at a time"], "green")
    d.line((256, 458), (296, 458), arrow=True)
    _card(
        d,
        298,
        520,
        150,
        92,
        "scheduler/  kv/",
        ["prefill / decode", "chunks, preemption", "paged prefix cache"],
        "teal",
    )
    d.line((383, 498), (383, 518), arrow=True)
    d.line((363, 518), (363, 498), arrow=True)
    _card(d, 298, 334, 150, 62, "loader/", ["safetensors, configs"], "green")
    d.line((373, 396), (373, 418), arrow=True)

    _card(d, 506, 334, 268, 62, "execution_graph/", ["block graph → kernel graph, per stage"], "blue")
    _card(
        d, 506, 420, 268, 76, "executor/", ["CPU: one native call list per step", "other devices: torch plan"], "blue"
    )
    native = ["C++ compiled on first use, cached", "GEMM on packed weights", "torch reference without a compiler"]
    _card(d, 506, 520, 268, 92, "kernels/", native, "blue")
    d.line((448, 458), (504, 458), arrow=True)
    d.line((640, 396), (640, 418), arrow=True)
    d.line((640, 518), (640, 498), arrow=True)

    _card(d, 826, 420, 146, 76, "engine/", ["sampling", "stop rules, logprobs"], "green")
    d.line((774, 458), (824, 458), arrow=True)
    d.line((972, 458), (1006, 458), arrow=True)
    d.text(1012, 462, "text", bold=True)
    d.line((900, 256), (900, 365), (776, 365), arrow=True)
    d.text(908, 318, "builders, rules, kernels", size=12, colour="soft")

    d.box(826, 520, 260, 92, stroke="line", dashed=True)
    d.text(840, 544, "core/", bold=True, mono=True, size=13.5)
    d.text(840, 566, "graph IR, rewriting, layouts, errors:", size=12, colour="soft")
    d.text(840, 584, "all that generated code imports", size=12, colour="soft")
    return d.render(DESCRIPTION)


def _band(d: Drawing, y: float, height: float, title: str, command: str) -> None:
    d.box(12, y, WIDTH - 24, height, fill=None, radius=12)
    d.text(34, y + 30, title, bold=True, size=15)
    d.text(46 + 9.6 * len(title), y + 30, command, mono=True, size=12.5, colour="soft")


def _list(
    d: Drawing,
    x: float,
    y: float,
    width: float,
    height: float,
    title: str,
    note: str,
    colour: str,
    rows: Sequence[tuple[str, str]],
    pitch: float,
) -> None:
    d.box(x, y, width, height, stroke=colour)
    d.text(x + 14, y + 25, title, bold=True, mono=True, size=14, colour=colour)
    d.text(x + width - 14, y + 25, note, size=12, colour="soft", anchor="end")
    name_width = max(len(name) for name, _ in rows) * 7.4 + 14
    for i, (name, about) in enumerate(rows):
        top = y + 50 + i * pitch
        d.text(x + 14, top, name, mono=True, size=12)
        d.text(x + 14 + name_width, top, about, size=12, colour="soft")


def _card(
    d: Drawing, x: float, y: float, width: float, height: float, title: str, lines: Sequence[str], colour: str
) -> None:
    d.box(x, y, width, height, stroke=colour)
    d.text(x + 12, y + 23, title, bold=True, mono=True, size=13, colour=colour)
    for i, line in enumerate(lines):
        d.text(x + 12, y + 43 + 18 * i, line, size=12, colour="soft")
