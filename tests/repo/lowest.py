"""Prints requirements of an environment with the lowest declared version of each dependency, for `make test-lowest`.

torch and the test tools have the versions of constraints.txt: an old torch may not exist as a CPU build.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = ("torch", "hypothesis", "pytest", "pytest-timeout", "syrupy")


def lowest_versions(dependencies: list[str]) -> list[str]:
    """`x>=1` becomes `x==1`. Raises ValueError for a dependency without a lower bound or an exact version."""
    found = []
    for dependency in dependencies:
        parts = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+)", dependency)
        if parts is None:
            raise ValueError(f"a dependency must be NAME>=VERSION or NAME==VERSION, got {dependency!r}")
        if parts[1] not in PINNED:
            found.append(f"{parts[1]}=={parts[2]}")
    return found


def pinned_versions(constraints: str) -> list[str]:
    """The lines of the packages in PINNED."""
    return [line for line in constraints.splitlines() if line.partition("==")[0] in PINNED]


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    print("\n".join([*lowest_versions(project["dependencies"]), *pinned_versions(constraints)]))
