"""Name lookup for a layout's statements: values, operands and attrs, with their types."""

import ast
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.constants import constant
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.conditions import Index, expression_text, link_condition
from sageLLM.codegen.link.expressions import Names, compile_expression, kind_of
from sageLLM.codegen.link.flat_layout import Located
from sageLLM.codegen.link.interfaces import Interfaces
from sageLLM.codegen.link.operands import Match
from sageLLM.codegen.link.sizes import link_size
from sageLLM.codegen.model.layout import BlockDef, Condition, ConfigName, InputDef, Phase, WeightDef
from sageLLM.codegen.model.op import Attr, OpDef, Operand
from sageLLM.codegen.schema.models import Scalar

_VALUE = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_RESERVED = frozenset(
    {"g", "c", "stage", "layer", "block", "kc", "vc", "ops", "own_ops", "dims", "num_rows", "call_block"}
    | {"math", "range", "tuple", "min", "max", "abs", "any", "computed", "computed_in_layer"}
    | {"true", "false", "null"}
)  # fmt: skip
"""Names of the generated function: its parameters, the modules and functions that it uses; and words of expressions."""
FUNCTIONS = frozenset(
    {"models", "program", "weights", "cache", "shard_config", "ops", "own_ops", "dims", "num_rows", "call_block"}
    | {"math", "computed", "computed_in_layer"}
)
"""Names of a generated module, which layouts and blocks must not have."""
_SECTION_OF = {
    "cos": "a `rope` section defines cos",
    "sin": "a `rope` section defines sin",
    "slopes": "an `alibi` section defines slopes",
}
_FITS = {"f32": ("int", "float"), "i32": ("int", "size"), "dim": ("int", "size"), "bool": ("bool",), "str": ("str",)}


def is_value_name(name: str) -> bool:
    """Whether a layout's value may have the name; reserved names are used by the generated function."""
    return bool(_VALUE.match(name)) and not is_reserved(name)


def is_reserved(name: str) -> bool:
    """Whether the name is a keyword, or one that the generated function uses."""
    return iskeyword(name) or name in _RESERVED


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a name. The type is None after a finding, so that one mistake is reported once."""

    type: ValueType | None
    weight: WeightDef | None = None
    is_partial: bool = False

    @property
    def is_optional(self) -> bool:
        return self.weight is not None and self.weight.when is not None


@dataclass(frozen=True, slots=True)
class LayoutContext:
    """Everything outside a body that the statements of one layout may refer to."""

    ops: Interfaces
    config: Mapping[str, ConfigName]
    inputs: Mapping[str, InputDef]
    attend: Mapping[Phase, OpDef]
    blocks: Mapping[str, BlockDef | None]
    sink: Sink
    divides: frozenset[str] = frozenset()


@dataclass(slots=True)
class Scope:
    """The values defined at one point of a body; `values` grows with the results of its statements.

    `undefined` maps names that only some branches of a `choose` assign to the reason why they cannot be used.
    """

    context: LayoutContext
    values: dict[str, Value]
    is_block: bool
    index: Index | None = None
    used_weights: set[tuple[str | None, str]] = field(default_factory=set)
    assigned: list[str] = field(default_factory=list)
    passed_on: set[str] = field(default_factory=set)  # partial sums that were passed on into other partial sums
    undefined: dict[str, str] = field(default_factory=dict)
    present: frozenset[str] = frozenset()  # config names that are not null on this path

    def operands(self, text: Text, call: ast.Call, op: OpDef) -> list[tuple[ast.expr, Operand]]:
        """The arguments of the call with their operands; raises Refused if their number does not fit."""
        required = [operand for operand in op.inputs if not operand.optional]
        if not len(required) <= len(call.args) <= len(op.inputs):
            names = ", ".join(operand.name for operand in op.inputs)
            expected = f"{count_words(len(required), len(op.inputs))} ({names})"
            raise text.refuse("SAGE222", f"{op.name}: expected {expected}, got {len(call.args)}", call, f"see {op.ref}")
        return list(zip(call.args, op.inputs, strict=False))

    def argument(self, text: Text, node: ast.expr, operand: Operand, *, may_be_partial: bool = False) -> str:
        """The name of the value passed to an operand; raises Refused if it cannot be passed there."""
        if not isinstance(node, ast.Name):
            message = f"the argument '{operand.name}' must be the name of a value"
            raise text.refuse("SAGE220", message, node, "assign the expression to a name first")
        value = self.value(text, node, may_be_partial=may_be_partial)
        if value.is_optional and not operand.optional:
            assert value.weight is not None and value.weight.when is not None, "only weights with `when` are optional"
            message = f"'{operand.name}' requires a value, but '{node.id}' exists only when {value.weight.when.source}"
            raise text.refuse("SAGE226", message, node, "pass it to an optional operand, or remove its `when`")
        return node.id

    def value(self, text: Text, node: ast.Name, *, may_be_partial: bool = False) -> Value:
        """The value of a name, which may be an input of the step; raises Refused if it is not defined."""
        found = self.values.get(node.id)
        if found is None and node.id in self.context.inputs:
            step_input = self.context.inputs[node.id]
            if not step_input.is_per_layer or self.is_block:
                found = Value(step_input.type)
        if found is None:
            known = [*self.values, *(name for name, one in self.context.inputs.items() if not one.is_per_layer)]
            section = _SECTION_OF.get(node.id.partition("_")[0])
            help = self.undefined.get(node.id) or section or did_you_mean(node.id, known)
            raise text.refuse("SAGE223", f"'{node.id}' is not defined here", node, help)
        if found.is_partial and not may_be_partial:
            raise text.refuse("SAGE241", *partial_sum_finding(node))
        if found.weight is not None:
            self.used_weights.add((found.weight.block, found.weight.name))
        return found

    def attrs(self, text: Text, call: ast.Call, op: OpDef, operands: Collection[str] = ()) -> list[tuple[str, str]]:
        """The attrs as Python text over the config; `operands` are those that may be passed by keyword as well."""
        attrs: list[tuple[str, str]] = []
        for keyword in call.keywords:
            if keyword.arg in operands:
                continue
            attr = op.attr(keyword.arg or "")
            if attr is None:
                help = did_you_mean(keyword.arg or "", [*(known.name for known in op.attrs), *operands])
                raise text.refuse("SAGE225", f"unknown attr '{keyword.arg}' of {op.name}", keyword, help)
            attrs.append((attr.name, self._attr(text, keyword.value, attr)))
        missing = [attr.name for attr in op.attrs if attr.is_required and attr.name not in dict(attrs)]
        if missing:
            raise text.refuse("SAGE225", f"{op.name} requires the attr '{missing[0]}'", call, f"add {missing[0]}=...")
        return attrs

    def _attr(self, text: Text, value: ast.expr, attr: Attr) -> str:
        """An attr as Python text, after its type is checked against the declared one."""
        part = text.part(*text.offsets(value))
        node = compile_expression(part, self.names, self.present)
        kind, shown = kind_of(node, part, self.names, self.present), ast.unparse(node)
        if kind.type not in ("null", *_FITS[attr.type]):
            message = f"{attr.name}: expected {attr.type}, got '{shown}': {kind.type}"
            raise text.refuse("SAGE225", message, value, f"pass a value of type {attr.type}")
        if kind.is_optional and not attr.optional:
            help = "pass a value" if kind.type == "null" else f"write `{shown} if {shown} is not null else ...`"
            if isinstance(node, ast.Name) and kind.type != "null":
                help = f"define a default for '{shown}' that is not null"
            raise text.refuse("SAGE225", f"'{attr.name}' must not be null, but '{shown}' may be", value, help)
        known: Scalar = constant(node)
        if isinstance(node, ast.Name) and (found := self.context.config.get(node.id)) is not None:
            known = found.value  # the value that the family fixes, or the default
        if known is not None and (why := attr.why_not(known)) is not None:
            is_name = isinstance(node, ast.Name)
            help = f"change the config name '{shown}'" if is_name else f"change the value, or the attr of '{attr.name}'"
            raise text.refuse("SAGE225", why, value, help)
        return self.python(node, part)

    @property
    def names(self) -> Names:
        return Names(self.context.config, self.index.name if self.index else None)

    def python(self, node: ast.expr, text: Text) -> str:
        """An expression as Python text for the generated function."""
        return expression_text(node, text.value, self.context.config, self.index)

    def condition(self, located: Located[str]) -> Condition:
        """The condition of a branch; raises Refused."""
        text = located.text(located.value, self.context.sink)
        return link_condition(text, self.context.config, self.index, self.present)

    def dim_attrs(self, text: Text, op: OpDef, call: ast.Call) -> dict[str, Size]:
        """The dim attrs of the call."""
        found: dict[str, Size] = {}
        for keyword in call.keywords:
            attr = op.attr(keyword.arg or "")
            if attr is not None and attr.type == "dim":
                start, end = text.offsets(keyword.value)
                found[attr.name] = link_size(text.part(start, end), self.context.config)
        return found

    def infer(
        self,
        text: Text,
        op: OpDef,
        args: list[str | None],
        attrs: Mapping[str, str],
        call: ast.Call,
        convert: Callable[[ValueType], ValueType],
    ) -> tuple[ValueType, ...]:
        """The result types of an op; raises Refused where an operand does not fit. `seen_as` maps argument types."""
        match_ = Match(op, self.dim_attrs(text, op, call))
        for operand, name in zip(op.inputs, args, strict=True):
            type_ = self.type_of(name) if name is not None else None
            if name is None:
                continue
            if type_ is None:
                raise Refused
            expected = match_.bind(operand, convert(type_))
            if expected is not None:
                node = next((n for n in call.args if isinstance(n, ast.Name) and n.id == name), call)
                message = f"{op.name}.{operand.name}: expected {expected}, got '{name}': {convert(type_)}"
                raise text.refuse("SAGE224", message, node, f"see {op.ref}")
        return tuple(match_.result(operand.type) for operand in op.outputs)

    def type_of(self, name: str) -> ValueType | None:
        if name in self.values:
            return self.values[name].type
        found = self.context.inputs.get(name)
        return found.type if found else None

    def assign_all(
        self, text: Text, targets: list[ast.Name], types: tuple[ValueType, ...], call: ast.Call, *, is_partial: bool
    ) -> None:
        if len(targets) != len(types):
            message = f"the call returns {len(types)} results, got {len(targets)} names"
            raise text.refuse("SAGE222", message, call, "write one name per result on the left of `=`")
        for target, type_ in zip(targets, types, strict=True):
            self.assign(target.id, Value(type_, is_partial=is_partial))

    def assign(self, name: str, value: Value) -> None:
        self.undefined.pop(name, None)
        self.values[name] = value
        self.assigned.append(name)


def partial_sum_finding(node: ast.Name, reason: str = "it requires the complete sum") -> tuple[str, ast.Name, str]:
    """The finding about a partial sum that is read before it is reduced."""
    message = f"'{node.id}' is a partial sum over the ranks and must be reduced before it is used here"
    return message, node, f"{reason}; return '{node.id}' from the block, so that the program reduces it first"


def count_words(least: int, most: int) -> str:
    if least == most:
        return f"{most} value" if most == 1 else f"{most} values"
    return f"{least} to {most} values"
