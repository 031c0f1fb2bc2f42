"""Writes a comparison into the documentation: docs/benchmarks.md, docs/formats.md, both READMEs and the plot.

    python benchmarks/peers/publish.py [benchmarks/results/peers.json]

Results of other workloads and instructions next to that file (`MORE`) follow it in docs/benchmarks.md. Refuses a result
that was measured without waiting for a quiet machine.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from table import best_peer, text_of, voids_of
from variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
MORE = ("peers_long.json", "peers_avx2.json")
BEGIN, END = "<!-- peers: begin -->\n", "<!-- peers: end -->\n"
SHAPES = {"135m": "SmolLM-135M", "0.6b": "Qwen3-0.6B"}
FIGURES = {
    "decode": ("decode, one request", "单请求解码", "tok/s"),
    "prefill_1024": ("prefill of 1024 tokens", "1024 个词元的预填充", "tok/s"),
    "serve_16": ("16 requests, output", "16 个并发请求的输出", "tok/s"),
    "serve_32": ("32 requests, output", "32 个并发请求的输出", "tok/s"),
    "startup_s": ("import, load and first token", "导入、加载并产生首个词元", "s"),
    "peak_mb": ("peak memory", "内存峰值", "MB"),
}
PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/images/measured-dark.svg">
  <img alt="{}" src="docs/images/measured-light.svg">
</picture>
"""


def readme_block(result: Mapping[str, Any], *, is_chinese: bool) -> str:
    """The lines between the marks of a README: conditions, plot, and ours with the ratio to the best 16-bit engine."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    page = "docs/benchmarks.md#comparison-with-other-engines"
    if is_chinese:
        conditions = (
            f"与其他引擎的对比（{where}）：16 位权重，随机权重的检查点；"
            f"各引擎在全新进程中轮流运行，取中位数（[全表]({page})）。"
        )
        picture, header = "sageLLM 与其他引擎在两种模型形状下的每秒词元数", "| 测量项 | 数值 | 命令 |"
    else:
        conditions = (
            f"Compared with other engines ({where}): 16-bit weights, checkpoints of random weights; medians of fresh "
            f"processes that take turns ([whole table]({page}))."
        )
        picture, header = (
            "Tokens per second of sageLLM and of others for two shapes",
            "| measurement | figure | command |",
        )
    lines = [conditions, "", PICTURE.format(picture), header, "|---|---|---|"]
    for shape, title in SHAPES.items():
        rows = result["rows"].get(shape, {}).get("native", {})
        for figure, (english, chinese, unit) in FIGURES.items():
            row = rows.get(figure, {})
            best = best_peer(figure, row, "16-bit", voids_of(result, shape))
            if "ours" not in row or best is None:
                continue
            ratio = row["ours"]["median"] / row[best]["median"]
            name = f"{title} 形状：{chinese}" if is_chinese else f"{title} shape: {english}"
            engine = VARIANTS[best].name
            lines.append(f"| {name} | {row['ours']['median']:g} {unit}, {ratio:.2f}x {engine} | `make bench-peers` |")
    return "\n".join(lines) + "\n"


def formats_block(result: Mapping[str, Any]) -> str:
    """The speed of ours by the form of the weights, of one request and of a prompt of 1024 tokens."""
    figures = [(shape, figure) for shape in SHAPES for figure in ("decode", "prefill_1024")]
    titles = [f"{SHAPES[shape]}: {FIGURES[figure][0]}" for shape, figure in figures]
    lines = [f"| weights | {' | '.join(titles)} |", "|---" + "|--:" * len(figures) + "|"]
    for variant in VARIANTS.values():
        rows = [result["rows"].get(shape, {}).get("native", {}).get(figure, {}) for shape, figure in figures]
        if variant.engine == "ours" and any(variant.name in row for row in rows):
            cells = [f"{row[variant.name]['median']:g}" if variant.name in row else "" for row in rows]
            activations = "" if variant.activations == "auto" else f", activations in {variant.activations}"
            lines.append(f"| {variant.form}{activations} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replace_block(path: Path, block: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Replaces the lines between the marks of a page."""
    text = path.read_text(encoding="utf-8")
    start, end = text.index(marks[0]) + len(marks[0]), text.index(marks[1])
    path.write_text(text[:start] + block + text[end:], encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A result. Exits if other work disturbed it."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not result["is_quiet"]:
        sys.exit(f"{path} was measured with --no-wait: measure again on a quiet machine")
    return result


def main(path: Path) -> None:
    result = read(path)
    more = [read(path.with_name(name)) for name in MORE if path.with_name(name).exists()]
    replace_block(ROOT / "README.md", readme_block(result, is_chinese=False))
    replace_block(ROOT / "README.zh-CN.md", readme_block(result, is_chinese=True))
    replace_block(ROOT / "docs" / "benchmarks.md", "\n".join(text_of(one) + "\n" for one in (result, *more)))
    replace_block(ROOT / "docs" / "formats.md", formats_block(result))
    sys.path.append(str(ROOT / "docs" / "images"))
    import measured

    for theme in ("light", "dark"):
        (ROOT / "docs" / "images" / f"measured-{theme}.svg").write_text(measured.draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "peers.json")
