"""Emits node classes and builder functions: `ops/norm.py` per spec file, `ops/op_types.py`, and the table OPS."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.contents import Contents
from sageLLM.codegen.emit.dim_text import tidy
from sageLLM.codegen.emit.python_text import python_text
from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.model.op import Attr, OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit

BASE = "sageLLM.generated.ops"
CORE_ELEMENTS = {"E": "E", "bool": "bool_"} | {name: name for name in DTYPES if name != "bool"}
_PYTHON = {"f32": "float", "i32": "int", "bool": "bool", "str": "str", "dim": "Dim"}


@dataclass(frozen=True, slots=True)
class NodeView:
    """The view of one op: its definition, and Python text of its types, attrs, conditions and costs."""

    op: OpDef
    patterns: Mapping[str, str]
    attr_specs: Mapping[str, str]
    conditions: Sequence[tuple[str, str]]
    flops: str
    bytes: str
    attr_types: Mapping[str, str]
    parameters: str
    passed: Sequence[str]  # attrs that are passed on unchanged
    computed: Sequence[str]  # attrs that default to a formula of dims when None
    optional: Sequence[str]


def emit_ops(ops: Sequence[OpDef], specs: Specs, renderer: Renderer) -> list[Output]:
    """The module of one ops file."""
    nodes = [node_view(op) for op in ops]
    text = renderer.render(
        "ops.py.jinja",
        nodes=nodes,
        source=ops[0].entry.doc.file,
        symbols=_symbols(ops),
        elements=_elements(ops),
        base=BASE if specs.is_overlay else "",
    )
    source = header(ops[0].entry.doc.file, ops[0].name)
    return [Output(f"ops/{ops[0].stem}.py", source + text, tuple(op.ref for op in ops))]


def emit_op_types(specs: Specs, renderer: Renderer) -> list[Output]:
    """`ops/op_types.py`; an overlay uses the package's."""
    if specs.is_overlay:
        return []
    types = {name: entry.spec for name, entry in specs.raw.op_types.items()}
    text = header("specs/op_types.yaml", "op_types") + renderer.render("op_types.py.jinja", types=types)
    return [Output("ops/op_types.py", text, ("specs/op_types.yaml",))]


def emit_op_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`ops/__init__.py` with OPS."""
    text = renderer.render(
        "op_registry.py.jinja", ops=contents.ops, modules=contents.ops_by_stem, has_types=not contents.is_overlay
    )
    entries = tuple(op.ref for op in contents.ops)
    return [Output("ops/__init__.py", header("specs/ops", "rms_norm") + text, entries)]


def _symbols(ops: Iterable[OpDef]) -> list[str]:
    """Every dim and cost symbol of the file, in order of first use."""
    found: dict[str, None] = {}
    for op in ops:
        found |= dict.fromkeys(op.symbols)
    for op in ops:
        found |= dict.fromkeys([*op.cost.flops.symbols, *op.cost.bytes.symbols])
    return list(found)


def _elements(ops: Iterable[OpDef]) -> tuple[list[str], list[str]]:
    """The element types to import from the core library, and the variables to declare."""
    used = dict.fromkeys(o.type.element for op in ops for o in (*op.inputs, *op.outputs))
    return [CORE_ELEMENTS[name] for name in used if name in CORE_ELEMENTS], [n for n in used if n not in CORE_ELEMENTS]


def node_view(op: OpDef) -> NodeView:
    operands = (*op.inputs, *op.outputs)
    return NodeView(
        op=op,
        patterns={o.name: pattern(o.type) for o in operands},
        attr_specs={attr.name: attr_spec(attr) for attr in op.attrs},
        conditions=[(c.text, tidy(python_text(c.value, _in_env))) for c in op.where],
        flops=formula(op.cost.flops),
        bytes=formula(op.cost.bytes),
        attr_types={attr.name: _PYTHON[attr.type] + (" | None" if attr.optional else "") for attr in op.attrs},
        parameters=_parameters(op),
        passed=[attr.name for attr in op.attrs if attr.formula is None],
        computed=[attr.name for attr in op.attrs if attr.formula is not None],
        optional=[o.name for o in op.inputs if o.optional],
    )


def pattern(type_: ValueType) -> str:
    """`E[..., 2 * I]`."""
    dims = ", ".join(map(str, type_.dims)) or "()"
    return f"{CORE_ELEMENTS.get(type_.element, type_.element)}[{dims}]"


def _in_env(name: str) -> str:
    return f"d[{lit(name)}]"


def attr_spec(attr: Attr) -> str:
    """`AttrSpec("f32", default=1e-06, min=0.0)`."""
    fields = [lit(attr.type)]
    if attr.formula is not None:
        fields.append(f"default=lambda d: {tidy(python_text(attr.formula, _in_env))}")
    elif attr.optional or attr.default is not None:
        fields.append(f"default={lit(attr.default)}")
    fields += [f"{key}={lit(value)}" for key in ("min", "max", "choices") if (value := getattr(attr, key)) is not None]
    return f"AttrSpec({', '.join(fields)})"


def _parameters(op: OpDef) -> str:
    """The builder's parameters after the writer: operands, then attrs and result names by keyword."""
    inputs = [f"{o.name}: TensorRef | None = None" if o.optional else f"{o.name}: TensorRef" for o in op.inputs]
    attrs = [_parameter(attr) for attr in op.attrs]
    names = [o.name for o in op.outputs]
    label = f"name: str = {lit(names[0])}"
    if len(names) > 1:
        label = f"names: tuple[{', '.join(['str'] * len(names))}] = {lit(tuple(names))}"
    return ", ".join([*inputs, "*", *attrs, label])


def _parameter(attr: Attr) -> str:
    if attr.optional or attr.formula is not None:
        return f"{attr.name}: {_PYTHON[attr.type]} | None = None"
    default = f" = {lit(attr.default)}" if attr.default is not None else ""
    return f"{attr.name}: {_PYTHON[attr.type]}{default}"
