"""vLLM's Grafana boards: each expression parses as PromQL, and its series and labels are in the server's metrics.

    python with_boards.py URL VERSION

The boards are those of vLLM's source package. Its build requires torch, so pip fails after it has unpacked it; that
suffices, as only JSON files are read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

ADDED = frozenset({"job", "instance"})
"""Labels that Prometheus adds when it scrapes."""
VARIABLE = "variable"
DURATION = re.compile(r"\$\{?__(?:rate_interval|interval|range)\}?")
Series = dict[str, dict[str, set[str]]]


def boards(version: str, folder: Path) -> list[Path]:
    options = ("--no-clean", "--no-deps", "--no-build-isolation", "--no-binary", "vllm", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"vllm=={version}"]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, check=False)
    found = sorted(folder.glob("pip-*/vllm*/examples/observability/**/*.json"))
    assert found, "the source package of vLLM was not downloaded"
    return found


def texts(node: Any, key: str) -> Iterator[str]:
    """The values of all entries of that name in a JSON value."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key and isinstance(value, str))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from texts(child, key)


def parse(expression: str) -> Any:
    """The syntax tree, with values for Grafana's variables. Raises ValueError."""
    text = DURATION.sub("5m", expression)
    text = re.sub(r"(histogram_quantile\()\s*\$\{?\w+\}?", r"\g<1>0.5", text)
    return promql.parse(re.sub(r"\$\{?\w+(?::\w+)?\}?", VARIABLE, text))


def nodes(tree: Any) -> Iterator[Any]:
    """All nodes of a tree."""
    yield tree
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (child := getattr(tree, name, None)) is not None:
            yield from nodes(child)
    for child in getattr(tree, "args", None) or ():
        yield from nodes(child)


def missing(tree: Any, series: Series) -> Iterator[str]:
    """The series, labels and values of an expression that the server does not have."""
    found: set[str] = set()
    for node in nodes(tree):
        if not isinstance(node, promql.VectorSelector):
            continue
        if node.name not in series:
            yield node.name
            continue
        found |= series[node.name].keys()
        for matcher in node.matchers.matchers:
            values = series[node.name].get(matcher.name)
            if values is None and matcher.name not in ADDED:
                yield f"{node.name} by {matcher.name}"
            elif values and matcher.op == promql.MatchOp.Equal and matcher.value not in (VARIABLE, *values):
                yield f"{node.name} of {matcher.name} {matcher.value}"
    for node in nodes(tree):
        modifier = getattr(node, "modifier", None) if isinstance(node, promql.AggregateExpr) else None
        yield from (f"label {label}" for label in (modifier.labels if modifier else ()) if label not in found | ADDED)


def series_of(url: str) -> Series:
    """The series of a server: their labels and the values of these."""
    page = urllib.request.urlopen(f"{url}/metrics").read().decode()
    series: Series = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = series.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return series


def main(url: str, version: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body)).read()
    series, num_expressions, problems = series_of(url), 0, []
    with tempfile.TemporaryDirectory() as folder:
        for path in boards(version, Path(folder)):
            board = json.loads(path.read_text(encoding="utf-8"))
            for expression in texts(board, "expr"):
                num_expressions += 1
                problems += [f"{path.name}: {one} in {expression}" for one in missing(parse(expression), series)]
            for name in re.findall(r"label_values\(([\w:]+), *\w+\)", json.dumps(board)):
                problems += [f"{path.name}: {name}"] if name not in series else []
    print(f"{num_expressions} expressions")
    assert num_expressions and not problems, "; ".join(problems)


if __name__ == "__main__":
    main(*sys.argv[1:])
