"""Kernel templates in the spec folder of a plugin: generated, found again, and refused where they cannot be used."""

import shutil
from pathlib import Path

import pytest
import torch

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.emit.derived_cases import derived_cases
from sageLLM.codegen.emit.op_tests import test_attrs as attrs_of
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.runtime.inspect.kernel_checks import problems_of_kernels, why_not_checked
from sageLLM.runtime.registry.plugins import load_registry

SPECS = Path(driver.PACKAGE, "examples/add_a_kernel/specs")
REFERENCE = "templates/reference/token_counts.py.jinja"
CPU = "templates/cpu/token_counts.cpp.jinja"
TRITON = "templates/triton/token_counts.py.jinja"


@pytest.fixture
def specs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SPECS, tmp_path / "specs"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def findings(memo: LinkMemo, *specs: Path) -> list[str]:
    with pytest.raises(SpecErrors) as caught:
        driver.emit(driver.load_and_link(specs, memo=memo))
    return [str(found) for found in caught.value.diagnostics]


def test_an_edited_template_is_generated_again(specs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    driver.generate([specs], out)
    ids = torch.tensor([[1, 1, 2], [0, 0, 0]], dtype=torch.int32)
    assert load_registry([out]).kernels["token_counts"](ids, V=4).tolist() == [[0, 2, 1, 0], [3, 0, 0, 0]]
    assert driver.generate([specs], out).changed == ()
    edit(specs / CPU, "int32_t* found", "int* found")
    changed = driver.generate([specs], out).changed
    assert "kernels/cpu/counts.cpp" in changed
    assert "kernels/reference/counts.py" not in changed
    assert driver.check([specs], out) == []
    edit(specs / CPU, "int* found", "{{ undefined }}")
    with pytest.raises(SpecErrors, match="'undefined' is undefined"):
        driver.generate([specs], out)


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        (
            REFERENCE,
            "{{ op }}",
            "{{ op.name.x }}",
            "specs/templates/reference/token_counts.py.jinja:2:1: error[SAGE123]: the template fails",
        ),
        (REFERENCE, "{{ attrs }}", "{{ size }}", "the op must fill the hole 'size' of the template 'token_counts'"),
        (REFERENCE, "{{ op }}", "{{ op", "error[SAGE123]: the template 'token_counts' does not parse"),
        (REFERENCE, "def {{ op }}", "def other", "the template must be a function of the 1 inputs of 'token_counts'"),
        (REFERENCE, "def {{ op }}(", "def {{ op }}((", "produces does not parse: "),
        (
            CPU,
            "{{ ids }}[",
            "{{ tokens }}[",
            "specs/templates/cpu/token_counts.cpp.jinja:6:1: error[SAGE123]: the template fails: 'tokens' is undefined",
        ),
        (
            CPU,
            "counts.dims[1] }}, 0",
            "counts.dims[7] }}, 0",
            "specs/templates/cpu/token_counts.cpp.jinja:5:1: error[SAGE123]: the template fails",
        ),
    ],
)
def test_a_template_with_a_mistake_is_a_finding(
    specs: Path, memo: LinkMemo, path: str, old: str, new: str, message: str
) -> None:
    edit(specs / path, old, new)
    assert message in findings(memo, specs)[0]


def test_a_template_that_would_not_be_used_is_refused(specs: Path, memo: LinkMemo) -> None:
    (specs / CPU).rename(specs / "templates/token_counts.cpp.jinja")
    [found] = findings(memo, specs)
    assert f"'{specs}/templates/token_counts.cpp.jinja' cannot be used: expected one of templates/reference/" in found


def test_a_template_of_the_package_is_not_replaced(specs: Path, memo: LinkMemo) -> None:
    (specs / "templates/reference/sample.py.jinja").write_text("def sample(): ...")
    places = f"{specs}/templates/reference/sample.py.jinja and {driver.PACKAGE}/templates/reference/sample.py.jinja"
    expected = f"error[SAGE504]: two templates have the name 'reference/sample.py.jinja': {places}"
    assert findings(memo, specs) == [expected]


def test_templates_of_two_overlays_do_not_replace_each_other(specs: Path, tmp_path: Path, memo: LinkMemo) -> None:
    other = Path(shutil.copytree(specs, tmp_path / "other"))
    (other / "ops/counts.yaml").rename(other / "ops/more.yaml")
    edit(other / "ops/more.yaml", "token_counts:", "more_counts:")
    assert f"two templates have the name 'cpu/token_counts.cpp.jinja': {other}" in findings(memo, specs, other)[0]


@pytest.fixture(scope="module")
def right_and_wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The generated example, without and with a fault in the kernel of each target."""
    folder = tmp_path_factory.mktemp("kernels")
    specs = Path(shutil.copytree(SPECS, folder / "specs"))
    driver.generate([specs], folder / "right")
    edit(specs / CPU, "int64_t t = 0;", "int64_t t = 1;")
    edit(specs / TRITON, "range(T)", "range(1, T)")
    driver.generate([specs], folder / "wrong")
    return folder / "right", folder / "wrong"


@pytest.mark.parametrize("target", ["cpu", "triton"])
def test_the_generated_tests_find_a_wrong_kernel(right_and_wrong: tuple[Path, Path], target: str) -> None:
    """With an odd size; without the fault there is no finding."""
    if reason := why_not_checked(target):
        pytest.skip(reason)
    checks = [{"op": "token_counts", "cases": [{"B": 3, "T": 17, "V": 300}], "attrs": {}, "limits": {}}]
    assert "CHECKS" in (right_and_wrong[0] / "tests/test_counts.py").read_text()
    right, wrong = (problems_of_kernels(target, out, checks) for out in right_and_wrong)
    assert right == []
    assert wrong == ["token_counts {'B': 3, 'T': 17, 'V': 300} float32: counts has other values than the reference"]


NO_CASES = """\
schema: ops/v1
ops:
  halves:
    summary: Half of the sum of both halves of a row.
    op_type: ELEMENTWISE
    inputs: {x: "E[T, N, D]", w: {type: "E[D/2]", optional: true}}
    outputs: {y: "E[T, N, D/2]"}
    where: ["N % 2 == 1", "D >= 4"]
    views: {a: "x[T, N, 0:D/2]", b: "x[T, N, D/2:D]"}
    compute: |
      h = E(0.5 * (f32(a) + f32(b)))
      y = optional(w, h * w, h)
"""


def test_an_op_without_cases_gets_derived_ones(tmp_path: Path, memo: LinkMemo) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/halves.yaml").write_text(NO_CASES)
    specs = driver.load_and_link([tmp_path / "mine"], memo=memo)
    cases = derived_cases(specs.ops["halves"], specs.ops, {})
    assert len(cases) >= 2
    assert all(case["N"] % 2 == 1 and case["D"] % 2 == 0 and case["D"] >= 4 for case in cases)
    text = next(output.text for output in driver.emit(specs) if output.path == "tests/test_halves.py")
    assert all(repr(case) in text for case in cases)


def test_cases_are_derived_for_every_op_with_equations(memo: LinkMemo) -> None:
    """Except for ops that compute the rows that they read, as random integers may then be invalid."""
    ops = driver.load_and_link(memo=memo).ops
    computed = {name: op for name, op in ops.items() if op.program is not None}
    without = {name for name, op in computed.items() if not derived_cases(op, ops, attrs_of(op))}
    assert without == {"embedding_shard", "pool_last", "position_embedding"}
