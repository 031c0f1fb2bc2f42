"""Size and accuracy of layouts: YAML lines next to transformers' Python lines, and the largest difference.

    python benchmarks/models.py                         # both tables, as in docs/models.md
    python benchmarks/models.py --vllm FOLDER           # with the files of vllm/model_executor/models as a column
    python benchmarks/models.py --layouts gemma2,qwen3  # of some layouts only

Lines are those that are neither blank nor comment; docstrings count, as summaries do in YAML. A layout that extends
another is read together with it, and so are the files of transformers that import one another; each is counted alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import transformers

from sageLLM.codegen import driver
from sageLLM.generated.builders import MODELS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the cases and checkpoints of the tests
TRANSFORMERS = Path(transformers.__file__).parent / "models"
VLLM_FILES = {"cohere": "commandr", "cohere2": "commandr", "deepseek_v3": "deepseek_v2", "gptj": "gpt_j"}
"""The stem of vLLM's file, where it is not the layout's name."""


TRANSFORMERS_FOLDERS = {"gemma3_mm": "gemma3", "llama4_mm": "llama4", "ministral3_mm": "mistral3"}
"""The folder of the model in transformers, where it is not the layout's name."""


def code_lines(paths: Iterable[Path]) -> int:
    """Lines that are neither blank nor comment."""
    lines = (line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def python_files(layout: str) -> list[Path]:
    """The files that define the model in the installed transformers."""
    folder = TRANSFORMERS_FOLDERS.get(layout, layout)
    return [TRANSFORMERS / folder / f"{kind}_{folder}.py" for kind in ("configuration", "modeling")]


def line_table(layouts: Iterable[str], vllm: Path | None) -> Iterator[str]:
    """A row per layout: what it extends, and lines of YAML and of Python."""
    models = driver.load_and_link().models
    yield f"| layout | extends | YAML | transformers {transformers.__version__} |{' vLLM |' if vllm else ''}"
    yield f"|---|---|--:|--:|{'--:|' if vllm else ''}"
    for name in layouts:
        base = models[name].base
        row = f"| {name} | {base.name if base else ''} | {code_lines([ROOT / 'specs' / 'models' / f'{name}.yaml'])} "
        row += f"| {code_lines(python_files(name))} |"
        if vllm is not None:
            file = vllm / f"{VLLM_FILES.get(name, name)}.py"
            row += f" {code_lines([file]) if file.is_file() else 'none'} |"
        yield row


def exactness_table(layouts: Iterable[str], mode: str) -> Iterator[str]:
    """A row per layout: whether greedy tokens are equal, and the largest difference of a log-probability."""
    from tests.conftest import save_random_model, small_config
    from tests.engine import test_oracle, test_oracle_experts, test_oracle_nested, test_oracle_recent

    cases = {**test_oracle.CASES, **test_oracle_recent.CASES, **test_oracle_experts.CASES, **test_oracle_nested.CASES}
    yield "| layout | case | tokens | largest difference |"
    yield "|---|---|---|--:|"
    for name in layouts:
        for case in (case for case in cases if case.split(",")[0].split(" ")[0] == name):
            family, config = cases[case]
            with tempfile.TemporaryDirectory() as folder:
                save_random_model(Path(folder), family, 0, "5GB", small_config(config))
                found = test_oracle.serve(Path(folder), test_oracle.PROMPTS, mode)
                wanted = test_oracle.expected(Path(folder), test_oracle.PROMPTS, found)
            tokens = "equal" if all(a[0] == b[0] for a, b in zip(found, wanted, strict=True)) else "differ"
            pairs = [pair for a, b in zip(found, wanted, strict=True) for pair in zip(a[1], b[1], strict=True)]
            yield f"| {name} | {case} | {tokens} | {max(abs(ours - theirs) for ours, theirs in pairs):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", help="names, separated by commas; all by default")
    parser.add_argument("--vllm", type=Path, help="a folder with vLLM's model files")
    parser.add_argument("--mode", default="hybrid", help="the scheduling mode of the comparison")
    parser.add_argument("--only", choices=["lines", "exactness"], help="one of the tables")
    args = parser.parse_args()
    layouts = args.layouts.split(",") if args.layouts else list(MODELS)
    if args.only != "exactness":
        print(*line_table(layouts, args.vllm), sep="\n", end="\n\n")
    if args.only != "lines":
        for row in exactness_table(layouts, args.mode):
            print(row, flush=True)


if __name__ == "__main__":
    main()
