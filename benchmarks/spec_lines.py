"""Counts the YAML lines of each op, model and pass: what a user writes to add one.

python benchmarks/spec_lines.py
"""

import statistics
from typing import Any

from sageLLM.codegen.driver import BASE_SPECS
from sageLLM.codegen.load import Entry, load_specs


def main() -> None:
    for name, value in measure().items():
        print(f"{name:<40} {value}")


def measure() -> dict[str, Any]:
    """Lines without comments and blank ones; for ops and passes the median and each, for models each."""
    raw = load_specs([BASE_SPECS])
    ops = {name: _num_lines(entry) for name, entry in raw.ops.items()}
    return {
        "yaml_lines_per_op_median": statistics.median(ops.values()),
        "yaml_lines_per_op": ops,
        "yaml_lines_per_model": {name: _num_lines(entry) for name, entry in raw.models.items()},
        "yaml_lines_per_pass": {name: _num_lines(entry) for name, entry in raw.passes.items()},
    }


def _num_lines(entry: Entry[Any]) -> int:
    """From the entry's key to the next line that is not indented deeper; the whole file for a model."""
    lines = entry.doc.text.split("\n")
    if entry.path:
        first = entry.key_span()
        start, indent = first.line - 1, first.column - 1
        end = next((i for i in range(start + 1, len(lines)) if _indent(lines[i]) <= indent), len(lines))
        lines = lines[start:end]
    return sum(1 for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else 10_000


if __name__ == "__main__":
    main()
