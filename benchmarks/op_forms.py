"""Counts the targets that have a kernel for each form of op in `tests/kernels/forms`.

Every op is linked by itself, so that the command also runs with an earlier version of the generator, which refuses
some of them:

    python benchmarks/op_forms.py
    PYTHONPATH=OLDER_CHECKOUT/_dev python benchmarks/op_forms.py
"""

import re
import sys
import tempfile
from pathlib import Path

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors

FORMS = Path(__file__).resolve().parents[1] / "tests/kernels/forms/ops"
TARGETS = ("reference", "cpu", "triton")


def main() -> None:
    counts = dict.fromkeys(TARGETS, 0)
    forms = [(path.stem, name, text) for path in sorted(FORMS.glob("*.yaml")) for name, text in entries(path)]
    for group, name, text in forms:
        found = targets(name, text)
        for target in found:
            counts[target] += 1
        print(f"{group:12} {name:28} {', '.join(found) or 'refused'}")
    print(f"{len(forms)} forms: " + ", ".join(f"{target} {count}" for target, count in counts.items()))


def entries(path: Path) -> list[tuple[str, str]]:
    """The ops of a file, each as its name and its lines."""
    body = path.read_text(encoding="utf-8").partition("ops:\n")[2]
    parts = re.split(r"^  (?=\w)", body, flags=re.MULTILINE)[1:]
    return [(part.partition(":")[0], "  " + part) for part in parts]


def targets(name: str, text: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder, "one/ops/one.yaml")
        spec.parent.mkdir(parents=True)
        spec.write_text(f"schema: ops/v1\nops:\n{text}", encoding="utf-8")
        try:
            outputs = driver.emit(driver.load_and_link([spec.parents[1]]))
        except SpecErrors:
            return []
        except Exception as error:  # an earlier version may crash
            print(f"{name}: {error!r}", file=sys.stderr)
            return []
    texts = {output.path: output.text for output in outputs}
    made = {"reference": f"def {name}(", "triton": f"def {name}("}
    found = [t for t, mark in made.items() if mark in texts.get(f"kernels/{t}/one.py", "")]
    has_cpu = f"SAGE_KERNEL({name})" in texts.get("kernels/cpu/one.cpp", "")
    return [target for target in TARGETS if target in found or (target == "cpu" and has_cpu)]


if __name__ == "__main__":
    main()
