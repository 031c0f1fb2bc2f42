"""Names in generated code: what the specs distinguish is distinct there, and no name changes a result."""

import ast
import builtins
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sageLLM.codegen import driver
from sageLLM.codegen.contents import class_name
from sageLLM.codegen.diagnostics import Sink, SpecErrors
from sageLLM.codegen.expr.types import DIM_NAME
from sageLLM.codegen.expr.value_names import RESERVED_FOR_OPERANDS
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.link.ops import link_op
from sageLLM.codegen.load import check_file, entries_of
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.names import CLASSES, DIMS, FUNCTIONS, PREFIXES
from sageLLM.codegen.render import Output
from sageLLM.codegen.source import parse_document
from sageLLM.codegen.writer import refuse_twice, write_plainly
from sageLLM.generated.tests.op_checks import make_operands, run
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.registry.plugins import load_registry

GENERATED = driver.BASE_OUT


# The lists of reserved names are complete: they contain what generated modules use besides the names of the specs.


def bound_names(tree: ast.Module) -> list[str]:
    """The names that a module binds at top level, once for each binding."""
    found: list[str] = []
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.append(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found += [(alias.asname or alias.name).partition(".")[0] for alias in names]
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
    return found


@pytest.fixture(scope="module")
def specs(memo: LinkMemo) -> Specs:
    return driver.load_and_link(memo=memo)


def test_reserved_names_are_complete(specs: Specs) -> None:
    of_specs = {*specs.ops, *specs.raw.dims, *(rule.name for one in specs.passes.values() for rule in one.rules)}
    of_specs |= {class_name(name) for name in (*specs.ops, *specs.passes)}
    of_specs |= {symbol for op in specs.ops.values() for symbol in (*op.elements, *op.symbols, *op.cost.let)}
    modules = [
        path
        for folder in ("ops", "kernels/reference", "kernels/triton", "passes")
        for path in (GENERATED / folder).glob("*.py")
    ]
    found = {name for path in modules for name in bound_names(ast.parse(path.read_text()))} - of_specs
    found = {name for name in found if not name.startswith(("_", *PREFIXES)) and not name.endswith("_size")}
    assert {name for name in found if name[0].islower()} <= FUNCTIONS
    assert {name for name in found if DIM_NAME.match(name)} <= CLASSES | DIMS
    kernels = "".join(re.sub(r"//.*", "", path.read_text()) for path in (GENERATED / "kernels/cpu").glob("*.cpp"))
    assert {word for word in re.findall(r"\b[A-Z]\w*", kernels) if DIM_NAME.match(word)} - of_specs <= DIMS


def test_members_of_nodes_are_reserved() -> None:
    assert {name for name in dir(OpNode) if not name.startswith("_")} <= RESERVED_FOR_OPERANDS


# Whatever names a spec has: it is refused with a place, or every entry has its own identifiers in every file.

WORDS = st.one_of(
    st.from_regex(r"\A[ab][ab2_]{1,3}\Z"),
    st.from_regex(r"\A[A-B][ab2]{0,2}\Z"),
    st.sampled_from(
        ["rope_2d", "rope2d", "a/b", "a b", "class", "none", "rms_norm", "fuse_norm", "ab_packed", "op_node"]
    ),
    st.sampled_from(["H", "Sum", "None", "E", "Rope2d", "A/B", "a-b", "rules_p", "Ops"]),
)
GATES = ("silu_mul", "gelu_mul", "gelu_tanh_mul")


def an_op(x: str, y: str, eps: str, value: str, dim: str) -> dict[str, Any]:
    return {
        "summary": "s",
        "op_type": "ELEMENTWISE",
        "dims": {dim: "the only one"},
        "inputs": {x: f"E[..., {dim}]"},
        "attrs": {eps: {"type": "f32", "default": 0.5}},
        "outputs": {y: f"E[..., {dim}]"},
        "compute": f"{value} = f32({x}) * {eps}\n{y} = E({value} * {value} + mean({value}, {dim}))",
        "tests": {"cases": [{"R": 3, dim: 5}]},
    }


def a_rule(name: str, gate: str) -> dict[str, Any]:
    lines = [f"m = {gate}(g)", "y = linear(m, w)"]
    return {"name": name, "match": lines, "rewrite": lines, "bounded": 1}


PLAIN = (
    ["op_ab", "op_ba", "op_aa"],  # ops
    ["ops", "more"],  # files of ops
    ["x", "y", "eps", "v", "Hd"],  # names in an op
    ["rule_a", "rule_b", "rule_c"],
    ["pass_a"],
)


@st.composite
def spec_files(draw: Any) -> dict[str, Any]:
    """Two files of ops and one of passes, of which a few names are random and often collide."""
    ops, files, inside, rules, passes = [list(names) for names in PLAIN]
    for _ in range(draw(st.integers(0, 3))):
        names = draw(st.sampled_from([ops, ops, files, inside, rules, passes]))
        names[draw(st.integers(0, len(names) - 1))] = draw(WORDS)
    x, y, eps, value, dim = inside
    about = {"summary": "s", "stage": "fuse", "level": "kernel"}
    fuse = about | {"kind": "rewrite", "rules": [a_rule(*pair) for pair in zip(rules, GATES, strict=True)]}
    return {
        f"ops/{files[0]}.yaml": {"schema": "ops/v1", "ops": {name: an_op(x, y, eps, value, dim) for name in ops[:2]}},
        f"ops/{files[1]}.yaml": {
            "schema": "ops/v1",
            "ops": {name: an_op("x", "y", "eps", "v", "Hd") for name in ops[2:]},
        },
        "passes/p.yaml": {
            "schema": "passes/v1",
            "passes": {"fuse_p": fuse, passes[0]: about | {"kind": "python", "function": "os.path:join"}},
        },
    }


def why_not_injective(output: Output, names: set[str]) -> Iterator[str]:
    """Names that a generated file binds twice: at top level, in a class, or as parameters."""
    if output.path.endswith(".cpp"):
        kernels = re.findall(r"SAGE_KERNEL\((\w+)\)", output.text)
        yield from (f"{output.path}: {name}" for name, count in Counter(kernels).items() if count > 1)
    if not output.path.endswith(".py"):
        return
    tree = ast.parse(output.text)  # which refuses equal parameters
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for scope in scopes:
        bound = Counter(bound_names(ast.Module(scope.body, [])))
        yield from (f"{output.path}: {name}" for name, count in bound.items() if count > 1)
    yield from (f"{output.path}: {name}" for name in {*bound_names(tree)} & names if name in dir(builtins))


MEMO = LinkMemo()  # not a fixture: hypothesis would print it, with millions of characters, for a failed example


@given(spec_files())
@settings(
    max_examples=50,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_random_names_are_refused_or_distinct(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("names")
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(data))  # which is YAML too
    try:
        specs = driver.load_and_link([folder], memo=MEMO)
    except SpecErrors as errors:
        assert all(found.span is not None for found in errors.diagnostics)
        return
    outputs = driver.emit(specs)
    try:
        refuse_twice((output.path, output.entries) for output in outputs)
    except SpecErrors:  # ops/rules_p.yaml and the rules of passes/p.yaml: both have generated tests of that name
        return
    own = {name for data in files.values() for key in ("ops", "passes") for name in data.get(key, ())}
    assert [twice for output in outputs for twice in why_not_injective(output, own)] == []
    texts = {output.path: output.text for output in outputs}
    for kind, table in (("ops", "ops/__init__.py"), ("passes", "passes/__init__.py")):
        entries = re.findall(r'^    "(\w+)": \w+,$', texts[table], re.MULTILINE)
        assert sorted(entries) == sorted(name for data in files.values() for name in data.get(kind, ()))


# Names of accepted specs have no influence on results, whatever they mean in Python, C++ or Triton.

NASTY = (
    *(
        "auto",
        "double",
        "int64_t",
        "register",
        "load",
        "store",
        "sizes",
        "tensors",
        "sweep",
        "row",
        "rows",
        "y_0",
        "exp",
    ),
    *("where", "min", "sum", "to", "part", "args", "math_errhandling", "stdin", "errno", "i_h", "x_r", "in_h", "mask"),
    *("column", "name", "f16", "wide_", "shape", "dtype", "size", "row_tile", "cast", "dist"),
)


def test_names_do_not_change_results(specs: Specs, memo: LinkMemo, tmp_path: Path) -> None:
    plain = ("x", "y", "eps", "v", "Hd")
    variants = [plain] + [tuple(word if i == k else plain[i] for i in range(5)) for word in NASTY for k in range(4)]
    ops = {f"named_{i}": an_op(*words) for i, words in enumerate(variants)}
    accepted = {name: op for name, op in ops.items() if links(name, op, specs)}
    assert len(accepted) > len(ops) / 2
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs/named.yaml").write_text(json.dumps({"schema": "ops/v1", "ops": accepted}))
    write_plainly(driver.emit(driver.load_and_link([tmp_path / "specs"], memo=memo)), tmp_path / "out")
    registry = load_registry([tmp_path / "out"])
    case, results = {"R": 3, "Hd": 5}, {}
    for name in accepted:
        operands = make_operands(registry.ops[name], case, {}, torch.float32)
        [results[name]] = run(registry.ops[name], registry.kernels[name], operands, case, {})
    assert [name for name, result in results.items() if not torch.equal(result, results["named_0"])] == []
    if (found := compiler.find_compiler()) is not None:
        source = tmp_path / "out/kernels/cpu/named.cpp"
        command = [
            *found.command,
            "-std=c++17",
            "-fsyntax-only",
            "-Wno-psabi",
            "-DSAGE_ELEMENT=f32",
            f"-I{compiler.HEADERS}",
        ]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]


def links(name: str, op: dict[str, Any], specs: Specs) -> bool:
    sink = Sink()
    file = check_file(parse_document(json.dumps({"schema": "ops/v1", "ops": {name: op}}), display="named.yaml"), sink)
    [(_, entry)] = entries_of(file) if file is not None else []
    return link_op(entry, specs.raw.vocabulary(), specs.ops, sink) is not None


def test_files_of_one_module_are_refused_with_both_places(tmp_path: Path) -> None:
    for path, name in (("one/halves.yaml", "half"), ("two/Halves.yaml", "third")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(json.dumps({"schema": "ops/v1", "ops": {name: an_op("x", "y", "eps", "v", "Hd")}}))
    with pytest.raises(SpecErrors) as caught:
        driver.load_and_link([tmp_path])
    root = tmp_path.name
    [found] = caught.value.diagnostics
    assert found.message == (
        f"{root}/two/Halves.yaml and {root}/one/halves.yaml would both be the module ops/halves.py"
    )
    assert [str(span) for _, span in found.related] == [f"{root}/one/halves.yaml:1:30"]
