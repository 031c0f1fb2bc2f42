"""What a layout's statements may refer to, and how a call's operands and attrs are looked up and typed there."""

import ast
import keyword
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.conditions import Index, expression_text, link_condition
from sageLLM.codegen.link.expressions import Names, compile_expression, kind_of
from sageLLM.codegen.link.flatten import Placed
from sageLLM.codegen.link.operands import Match
from sageLLM.codegen.link.sizes import link_size
from sageLLM.codegen.model.layout import BlockDef, Condition, ConfigName, InputDef, Phase, WeightDef
from sageLLM.codegen.model.op import Attr, OpDef, Operand

_VALUE = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_RESERVED = frozenset(
    {
        *("g", "c", "stage", "layer", "block", "kc", "vc", "ops", "own_ops", "dims", "true", "false"),
        *(
            "range",
            "tuple",
            "num_rows",
            "call_block",
            "math",
            "computed",
            "computed_in_layer",
            "min",
            "max",
            "abs",
            "any",
            "null",
        ),
    }
)
FUNCTIONS = frozenset(
    {
        *("models", "program", "weights", "cache", "shard_config", "ops", "own_ops", "dims", "num_rows", "call_block"),
        *("math", "computed", "computed_in_layer"),
    }
)
"""Names of a generated module; layouts and blocks cannot take them."""
_SECTION_OF = {name: f"a `rope` section gives {name}" for name in ("cos", "sin")} | {
    "slopes": "an `alibi` section gives slopes"
}
_FITS = {"f32": ("int", "float"), "i32": ("int", "size"), "dim": ("int", "size"), "bool": ("bool",), "str": ("str",)}


def is_value_name(name: str) -> bool:
    """Whether a layout's value may have the name; the others mean something in the generated function."""
    return bool(_VALUE.match(name)) and not keyword.iskeyword(name) and name not in _RESERVED


@dataclass(frozen=True, slots=True)
class Value:
    """What a name stands for. The type is None after a finding, so that one mistake is reported once."""

    type: ValueType | None
    weight: WeightDef | None = None
    is_partial: bool = False

    @property
    def is_optional(self) -> bool:
        return self.weight is not None and self.weight.when is not None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the statements of one layout may refer to."""

    ops: Mapping[str, OpDef]
    config: Mapping[str, ConfigName]
    inputs: Mapping[str, InputDef]
    attend: Mapping[Phase, OpDef]
    blocks: Mapping[str, BlockDef | None]
    sink: Sink
    divides: frozenset[str] = frozenset()


@dataclass(slots=True)
class Scope:
    """The values that are known at one place of a body; `values` grows with the results of its statements.

    `hidden` names what only some branches of a `choose` gave, with the reason why it cannot be used.
    """

    around: Surroundings
    values: dict[str, Value]
    is_block: bool
    index: Index | None = None
    used_weights: set[tuple[str | None, str]] = field(default_factory=set)
    assigned: list[str] = field(default_factory=list)
    handed_on: set[str] = field(default_factory=set)  # parts of sums that went into other parts
    hidden: dict[str, str] = field(default_factory=dict)
    present: frozenset[str] = frozenset()  # config names that are not null on this way

    def operands(self, text: Text, call: ast.Call, op: OpDef) -> list[tuple[ast.expr, Operand]]:
        needed = [operand for operand in op.inputs if not operand.optional]
        if not len(needed) <= len(call.args) <= len(op.inputs):
            names = ", ".join(operand.name for operand in op.inputs)
            message = f"{op.name} takes {count_words(len(needed), len(op.inputs))} ({names}), got {len(call.args)}"
            raise text.refuse("SAGE222", message, call, f"see {op.ref}")
        return list(zip(call.args, op.inputs, strict=False))

    def argument(self, text: Text, node: ast.expr, operand: Operand, *, may_be_part: bool = False) -> str:
        if not isinstance(node, ast.Name):
            raise text.refuse(
                "SAGE220", f"'{operand.name}' wants the name of a value", node, "give a result a name first"
            )
        value = self.value(text, node, may_be_part=may_be_part)
        if value.is_optional and not operand.optional:
            assert value.weight is not None and value.weight.when is not None, "only weights with `when` are optional"
            message = f"'{node.id}' is absent unless {value.weight.when.source}, but '{operand.name}' needs a value"
            raise text.refuse("SAGE226", message, node, "give it to an optional operand, or drop its `when`")
        return node.id

    def value(self, text: Text, node: ast.Name, *, may_be_part: bool = False) -> Value:
        """What the name stands for; an input of the step counts as known."""
        found = self.values.get(node.id)
        if found is None and node.id in self.around.inputs:
            given = self.around.inputs[node.id]
            if not given.is_per_layer or self.is_block:
                found = Value(given.type)
        if found is None:
            known = [*self.values, *(name for name, given in self.around.inputs.items() if not given.is_per_layer)]
            section = _SECTION_OF.get(node.id.partition("_")[0])
            help = self.hidden.get(node.id) or section or did_you_mean(node.id, known)
            raise text.refuse("SAGE223", f"'{node.id}' is not defined here", node, help)
        if found.is_partial and not may_be_part:
            raise text.refuse("SAGE241", *part_words(node))
        if found.weight is not None:
            self.used_weights.add((found.weight.block, found.weight.name))
        return found

    def attrs(self, text: Text, call: ast.Call, op: OpDef, operands: Collection[str] = ()) -> list[tuple[str, str]]:
        """The attrs as Python text over the config; `operands` are given by keyword, too."""
        attrs: list[tuple[str, str]] = []
        for given in call.keywords:
            if given.arg in operands:
                continue
            attr = op.attr(given.arg or "")
            if attr is None:
                help = did_you_mean(given.arg or "", [*(known.name for known in op.attrs), *operands])
                raise text.refuse("SAGE225", f"{op.name} has no attr '{given.arg}'", given, help)
            attrs.append((attr.name, self._attr(text, given.value, attr)))
        missing = [attr.name for attr in op.attrs if attr.is_required and attr.name not in dict(attrs)]
        if missing:
            raise text.refuse("SAGE225", f"{op.name} needs the attr '{missing[0]}'", call, f"write {missing[0]}=...")
        return attrs

    def _attr(self, text: Text, given: ast.expr, attr: Attr) -> str:
        """An attr as Python text, after its type was compared with the declared one."""
        part = text.part(*text.offsets(given))
        node = compile_expression(part, self.names, self.present)
        kind, shown = kind_of(node, part, self.names, self.present), ast.unparse(node)
        if kind.type not in ("null", *_FITS[attr.type]):
            raise text.refuse("SAGE225", f"'{attr.name}' wants {attr.type}, '{shown}' is {kind.type}", given)
        if kind.is_optional and not attr.optional:
            help = "give a value" if kind.type == "null" else f"write `{shown} if {shown} is not null else ...`"
            help = (
                f"give '{shown}' a default that is not null"
                if isinstance(node, ast.Name) and kind.type != "null"
                else help
            )
            raise text.refuse("SAGE225", f"'{shown}' may be null, but '{attr.name}' needs a value", given, help)
        return self.python(node, part)

    @property
    def names(self) -> Names:
        return Names(self.around.config, self.index.name if self.index else None)

    def python(self, node: ast.expr, text: Text) -> str:
        """An expression as the generated function writes it; arithmetic that may fail says what failed."""
        return expression_text(node, text.value, self.around.config, self.index)

    def condition(self, place: Placed[str]) -> Condition:
        """The condition of a branch; raises Refused."""
        text = place.text(place.value, self.around.sink)
        return link_condition(text, self.around.config, self.index, self.present)

    def dim_attrs(self, text: Text, op: OpDef, call: ast.Call) -> dict[str, Size]:
        """The dims that the call gives."""
        found: dict[str, Size] = {}
        for given in call.keywords:
            attr = op.attr(given.arg or "")
            if attr is not None and attr.type == "dim":
                start, end = text.offsets(given.value)
                found[attr.name] = link_size(text.part(start, end), self.around.config)
        return found

    def infer(
        self,
        text: Text,
        op: OpDef,
        args: list[str | None],
        attrs: Mapping[str, str],
        call: ast.Call,
        seen_as: Callable[[ValueType], ValueType],
    ) -> tuple[ValueType, ...]:
        """The result types of an op; raises Refused where an operand does not fit."""
        match_ = Match(op, self.dim_attrs(text, op, call))
        for operand, name in zip(op.inputs, args, strict=True):
            type_ = self.type_of(name) if name is not None else None
            if name is None:
                continue
            if type_ is None:
                raise Refused
            problem = match_.why_not(operand, seen_as(type_))
            if problem is not None:
                node = next((n for n in call.args if isinstance(n, ast.Name) and n.id == name), call)
                raise text.refuse(
                    "SAGE224", f"{op.name}: '{name}' is {seen_as(type_)}, {problem}", node, f"see {op.ref}"
                )
        return tuple(match_.result(operand.type) for operand in op.outputs)

    def type_of(self, name: str) -> ValueType | None:
        if name in self.values:
            return self.values[name].type
        found = self.around.inputs.get(name)
        return found.type if found else None

    def assign_all(
        self, text: Text, targets: list[ast.Name], types: tuple[ValueType, ...], call: ast.Call, *, is_partial: bool
    ) -> None:
        if len(targets) != len(types):
            raise text.refuse("SAGE222", f"the call gives {len(types)} results, {len(targets)} are named", call)
        for target, type_ in zip(targets, types, strict=True):
            self.assign(target.id, Value(type_, is_partial=is_partial))

    def assign(self, name: str, value: Value) -> None:
        self.hidden.pop(name, None)
        self.values[name] = value
        self.assigned.append(name)


def part_words(node: ast.Name, reason: str = "it needs the whole sum") -> tuple[str, ast.Name, str]:
    """The finding about a part of a sum that is read too early."""
    message = f"'{node.id}' is a rank's part of a sum and is used before the sum"
    return message, node, f"{reason}; return '{node.id}', so that the program completes the sum first"


def count_words(least: int, most: int) -> str:
    if least == most:
        return f"{most} value" if most == 1 else f"{most} values"
    return f"{least} to {most} values"
