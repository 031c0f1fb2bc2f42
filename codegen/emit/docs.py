"""Emits documentation: a page per op file and model, and the reference of the spec language from its schemas."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sageLLM.codegen.contents import Row
from sageLLM.codegen.expr.functions import FORMS, REDUCTIONS, SCANS, TOPS, UNARY
from sageLLM.codegen.load import SCHEMAS
from sageLLM.codegen.model.op import Attr, OpDef, Operand
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output
from sageLLM.codegen.writer import MARK

if TYPE_CHECKING:
    from sageLLM.codegen.model.layout import CheckpointDef, ConfigName, ModelDef, WeightDef


@dataclass(frozen=True, slots=True)
class Uses:
    """The rewrite rules and models that refer to an op, as rows of the pass and builder modules."""

    fused_by: tuple[Row, ...] = ()
    produced_by: tuple[Row, ...] = ()
    models: tuple[str, ...] = ()

    @classmethod
    def of(cls, op: str, rows: Iterable[Row]) -> "Uses":
        rows = list(rows)
        rules = [row for row in rows if "rule" in row]
        return cls(
            tuple(row for row in rules if op in row["consumes"]),
            tuple(row for row in rules if op in row["produces"]),
            tuple(row["model"] for row in rows if row.get("op") == op),
        )


_SCANS = (
    "the sum, product, largest or least of the elements up to each one; from the first NaN on NaN; sums and products "
    "are accumulated in f32 at least, those of integers wrap around"
)
_TOPS = (
    "the K largest elements in falling order, or their positions (i32), with K in the place of H; NaN is larger than "
    "everything, of equal elements the one with the lower position comes first; requires `where: [K <= H]`"
)


def emit_op_page(ops: Sequence[OpDef], uses: Mapping[str, Uses]) -> list[Output]:
    """`docs/ops/norm.md` for one ops file."""
    stem, parts = ops[0].stem, [op_section(op, uses[op.name]) for op in ops]
    return [page(f"docs/ops/{stem}.md", f"Ops: {stem}", ops[0].entry.doc.file, parts, [op.ref for op in ops])]


def emit_model_page(model: "ModelDef") -> list[Output]:
    """`docs/models/llama.md`."""
    path, title = f"docs/models/{model.name}.md", f"Model: {model.name}"
    return [page(path, title, model.entry.doc.file, [model_section(model)], [model.entry.ref])]


def emit_language_page(specs: Specs) -> list[Output]:
    """`docs/spec-language.md`; an overlay's specs are in the same language."""
    return [] if specs.is_overlay else [_language_page(specs)]


def page(path: str, title: str, source: str, parts: Iterable[str], entries: Iterable[str] = ()) -> Output:
    head = f"<!-- Code {MARK} from {source}. DO NOT EDIT. Regenerate: make generate -->\n# {title}\n"
    return Output(path, head + "\n" + "\n\n".join(parts) + "\n", tuple(entries))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"`{text}`" if text and "`" not in text else text


# ops


def op_section(op: OpDef, uses: Uses) -> str:
    """Meaning, operands, attrs and cost of an op, and what refers to it."""
    operands = [("input", operand) for operand in op.inputs] + [("output", operand) for operand in op.outputs]
    parts = [f"## {op.name}", _cell(op.summary)]
    parts += [_cell(op.doc)] if op.doc else []
    parts.append("```\n" + op.equation.replace("```", "'''") + "\n```")
    parts.append(table(("operand", "", "type", "meaning"), [_operand_row(kind, one, op) for kind, one in operands]))
    if op.attrs:
        parts.append(table(("attr", "type", "default", "meaning"), [_attr_row(attr) for attr in op.attrs]))
    facts = [
        ("op type", _code(op.op_type)),
        ("conditions", ", ".join(_code(condition.text) for condition in op.where) or "none"),
        ("flops", _code(str(op.cost.flops))),
        ("bytes moved", _code(str(op.cost.bytes))),
        ("symbols of the step", ", ".join(f"`{name}`: {text}" for name, text in op.cost.let.items()) or "none"),
        ("fused by", ", ".join(map(_rule_words, uses.fused_by)) or "no rule"),
        ("produced by", ", ".join(map(_rule_words, uses.produced_by)) or "no rule"),
        ("used by", ", ".join(map(_code, uses.models)) or "no model"),
    ]
    return "\n\n".join([*parts, table(("", ""), facts)])


def _rule_words(row: Row) -> str:
    """`rule` (pass `name`); a rule that does not have the name of the op that it produces also says which op it is."""
    produced = "" if row["produces"] == [row["rule"]] else f" into {', '.join(map(_code, row['produces']))}"
    return f"`{row['rule']}`{produced} (pass `{row['pass']}`)"


def _operand_row(kind: str, operand: Operand, op: OpDef) -> tuple[str, ...]:
    words = [operand.doc or "", "optional" if operand.optional else ""]
    if operand.name in op.inplace:
        words.append(f"overwrites `{op.inplace[operand.name]}`")
    return (_code(operand.name), kind, _code(str(operand.type)), "; ".join(word for word in words if word))


def _attr_row(attr: Attr) -> tuple[str, ...]:
    default = "required" if attr.is_required else "absent" if attr.optional else str(attr.default)
    return (_code(attr.name), attr.type, default if attr.formula is None else "from dims", attr.doc or "")


# models


def model_section(model: "ModelDef") -> str:
    """Config, weights and blocks of a layout."""
    names = [(_code(name.name), _code(_origin_of(name)), name.python_type, name.doc) for name in model.config.values()]
    parts = [_cell(model.summary), _checkpoints_read(model.checkpoints)]
    parts += [f"Extends `{model.base.name}`; this page shows the whole layout."] if model.base else []
    parts += ["## Config", table(("name", "key or value", "type", "meaning"), names)]
    if model.checks:
        parts.append("Checked: " + ", ".join(_code(check.words) for check in model.checks) + ".")
    parts += ["## Weights", table(("weight", "shape", "checkpoint"), [_weight_row(w) for w in _all_weights(model)])]
    for block in model.blocks.values():
        parts += [f"## Block {block.name}", _cell(block.summary), "```\n" + "\n".join(block.lines) + "\n```"]
    return "\n\n".join(parts)


def _checkpoints_read(found: "CheckpointDef") -> str:
    """The architectures, the section of config.json and the names of tensors in checkpoints."""
    text = f"Reads {', '.join(map(_code, found.architectures))}"
    if found.root:
        text += f": the text model, from `{found.root}` in config.json"
        text += f" with the `model_type` {' or '.join(map(_code, found.model_types))}" if found.model_types else ""
        text += ", or from its top level" if found.is_flat else ""
    names = [f"{_code(name)} is {' or '.join(map(_code, stored))}" for name, stored in found.renamed.items()]
    return f"{text}." + (f" In tensor names, {'; '.join(names)}." if names else "")


def _origin_of(name: "ConfigName") -> str:
    """The keys of config.json, or the constant or expression that defines a name without a key."""
    if name.keys:
        return ", ".join(name.keys)
    return str(name.value) if name.value is not None else str(name.formula or name.default)


def _all_weights(model: "ModelDef") -> "list[WeightDef]":
    return [*model.weights, *(weight for block in model.blocks.values() for weight in block.weights)]


def _weight_row(weight: "WeightDef") -> tuple[str, ...]:
    name = f"{weight.block}.{weight.name}" if weight.block else weight.name
    shape = f"[{', '.join(map(str, weight.dims))}]"
    condition = f" (when {weight.when.source})" if weight.when else ""
    return (_code(name), _code(shape), ", ".join(dict.fromkeys(_code(part.hf) for part in weight.parts)) + condition)


# the spec language


def _language_page(specs: Specs) -> Output:
    parts = [
        "Every spec file is one YAML mapping; its first line names its kind. Unknown fields are errors, values are "
        "never converted, and every error shows its line. `sagellm lint` checks spec files; editors complete them with "
        "the schemas in `generated/schema`.",
        "Dims, op types and step inputs are defined in `specs/dims.yaml`, `specs/op_types.yaml` and "
        "`specs/inputs.yaml`; limits of GPUs and configurations of their kernels in `specs/targets.yaml`.",
    ]
    parts += ["## The compute language", _compute_language()]
    for name, schema in SCHEMAS.items():
        parts += [f"## `schema: {name}`", *_schema_parts(schema.load(), set())]
    parts += ["## Dims", table(("dim", "meaning"), [(_code(n), entry.spec) for n, entry in specs.raw.dims.items()])]
    return page("docs/spec-language.md", "The spec language", "codegen/schema", parts)


def _compute_language() -> str:
    return table(
        ("form", "meaning"),
        [
            ("`name = expression`", "one statement per line; every name is assigned once"),
            ("`a + b`, `- * / // % **`, comparisons, `and or not`", "elementwise; dims are matched by name"),
            (", ".join(_code(f"{name}(v)") for name in UNARY), "elementwise"),
            (", ".join(_code(f"{name}(v, H)") for name in REDUCTIONS), "reduction of the named dim"),
            (", ".join(_code(f"{name}(v, H)") for name in SCANS), _SCANS),
            (", ".join(_code(f"{name}(v, H, K)") for name in TOPS), _TOPS),
            (", ".join(map(_code, FORMS)), "`dot(x, w, K)`, `gather(table, V, ids)`, `where(c, a, b)`, `min(a, b)`, "
             "`optional(name, with, without)`, `present(name)`"),
            ("`f32(v)`, `E(v)`, ...", "cast; values are rounded or widened only here"),
        ],
    )  # fmt: skip


def _schema_parts(schema: type[BaseModel], seen: set[type[BaseModel]]) -> list[str]:
    seen.add(schema)
    rows = [_field_row(field.alias or name, field) for name, field in schema.model_fields.items()]
    parts = [_cell(schema.__doc__ or ""), table(("field", "type", "default", "meaning"), rows)]
    for inner in _inner_schemas(schema):
        if inner not in seen:
            parts += [f"### {inner.__name__}", *_schema_parts(inner, seen)]
    return parts


def _field_row(name: str, field: FieldInfo) -> tuple[str, ...]:
    default = "required" if field.is_required() else _code(_default_words(field))
    return (_code(name), _code(_type_words(field.annotation)), default, field.description or "")


def _default_words(field: FieldInfo) -> str:
    """The default as JSON; that of a mapping with fields is the fields that it sets."""
    default = field.get_default(call_default_factory=True)
    return json.dumps(default, default=lambda inner: inner.model_dump(exclude_unset=True))


def _type_words(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = getattr(annotation, "__origin__", None)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    if origin in (dict, list):
        return f"{origin.__name__} of {' to '.join(_type_words(argument) for argument in arguments)}"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type_words(origin)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return " / ".join(map(str, arguments))
    return " or ".join(dict.fromkeys(_type_words(argument) for argument in arguments)) or str(annotation)


def _inner_schemas(schema: type[BaseModel]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    pending: list[Any] = [field.annotation for field in schema.model_fields.values()]
    while pending:
        annotation = pending.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        pending += get_args(annotation)
        pending += [annotation.__origin__] if hasattr(annotation, "__metadata__") else []
    return list(dict.fromkeys(found))
