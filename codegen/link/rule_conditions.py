"""Links the `where` of a rewrite rule: conditions on sizes and element types of values, and on attrs."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.satisfiable import Kind as ValueKind
from sageLLM.codegen.expr.satisfiable import may_hold
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Attr
from sageLLM.codegen.model.rule import RuleCondition, RuleDef
from sageLLM.codegen.schema.passes import PassSpec

Kind = Literal["number", "text", "truth"]
MAX_RANK = 8
CONDITION_HELP = "compare numbers: bytes(x), size(x, 0), rank(x), attrs of the pattern; or dtype(x) with a text"
_KINDS: Mapping[str, Kind] = {"f32": "number", "i32": "number", "dim": "number", "str": "text", "bool": "truth"}
_WORDS: Mapping[Kind, str] = {"number": "number", "text": "string", "truth": "condition"}
FUNCTIONS: Mapping[str, tuple[int, Kind]] = {
    "bytes": (1, "number"),
    "rank": (1, "number"),
    "size": (2, "number"),
    "dtype": (1, "text"),
}
"""Number of arguments and kind of the result: `size(x, 0)` is the first dim of x."""


def link_conditions(lines: list[str], rule: RuleDef, entry: Entry[PassSpec], sink: Sink) -> Iterator[RuleCondition]:
    """The conditions of a rule; those with findings are left out."""
    attrs = rule.attrs_bound
    values = {name for call in rule.pattern for name in (*call.reads, *call.targets)}
    for i, line in enumerate(lines):
        text = Text.of(line, entry, (*rule.path, "where", i), sink)
        try:
            node = parse_expression(text)
            if (kind := _Checker(text, attrs, values, rule.optional).kind(node)) != "truth":
                raise text.refuse(
                    "SAGE321", f"expected a condition, got a {_WORDS[kind]}", None, "write a comparison: ... <= 4096"
                )
            if not may_hold(node, lambda leaf: _kind_of_leaf(leaf, attrs)):
                message = f"no values satisfy `{line}`"
                raise text.refuse("SAGE324", message, None, "correct the condition or remove the rule")
        except Refused:
            continue
        yield RuleCondition(line, node)


def _kind_of_leaf(leaf: str, attrs: Mapping[str, Attr]) -> ValueKind | Sequence[object]:
    """The kind of an attr, or of a function of a value."""
    if leaf in attrs:
        kinds: dict[str, ValueKind] = {"f32": "float", "i32": "int", "bool": "bool", "str": "text", "dim": "size"}
        return attrs[leaf].choices or kinds[attrs[leaf].type]
    functions: dict[str, ValueKind | Sequence[object]] = {
        "bytes": "size",
        "size": "size",
        "rank": tuple(range(MAX_RANK + 1)),
        "dtype": tuple(DTYPES),
    }
    return functions.get(leaf.partition("(")[0], "any")


@dataclass(frozen=True, slots=True)
class _Checker:
    text: Text
    attrs: Mapping[str, Attr]
    values: set[str]
    optional: set[str]

    def kind(self, node: ast.expr) -> Kind:
        """The kind of an expression; raises Refused for everything outside the language of conditions."""
        match node:
            case ast.Constant(value=bool()):
                return "truth"
            case ast.Constant(value=int() | float()):
                return "number"
            case ast.Constant(value=str()):
                return "text"
            case ast.Name(id=name):
                return self._attr(name, node)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._function(name, args, node)
            case ast.BinOp(left=a, op=ast.Add() | ast.Sub() | ast.Mult(), right=b):
                return self._all([a, b], "number", "number")
            # Only constant divisors, so that evaluating a condition never raises.
            case ast.BinOp(left=a, op=ast.FloorDiv() | ast.Mod(), right=ast.Constant(value=int() as b)) if b > 0:
                return self._all([a], "number", "number")
            case ast.UnaryOp(op=ast.USub(), operand=a):
                return self._all([a], "number", "number")
            case ast.UnaryOp(op=ast.Not(), operand=a):
                return self._all([a], "truth", "truth")
            case ast.BoolOp(values=parts):
                return self._all(parts, "truth", "truth")
            case ast.Compare(left=a, ops=ops, comparators=others):
                if not all(isinstance(op, ast.Eq | ast.NotEq | ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in ops):
                    raise self._refuse("a comparison must be one of == != < <= > >=", node)
                return self._all([a, *others], self.kind(a), "truth")
        raise self._refuse("not supported in a condition", node)

    def _all(self, parts: list[ast.expr], expected: Kind, result: Kind) -> Kind:
        for part in parts:
            if (found := self.kind(part)) != expected:
                raise self._refuse(f"expected a {_WORDS[expected]}, got a {_WORDS[found]}", part)
        return result

    def _attr(self, name: str, node: ast.expr) -> Kind:
        if name not in self.attrs:
            message = f"expected an attr named in the pattern, got '{name}'"
            raise self.text.refuse("SAGE321", message, node, did_you_mean(name, self.attrs))
        if self.attrs[name].optional:
            raise self._refuse(f"'{name}' may be absent", node)
        return _KINDS[self.attrs[name].type]

    def _function(self, name: str, args: list[ast.expr], node: ast.expr) -> Kind:
        if name not in FUNCTIONS:
            raise self.text.refuse("SAGE321", f"unknown function '{name}'", node, did_you_mean(name, FUNCTIONS))
        num_args, kind = FUNCTIONS[name]
        match args:
            case [ast.Name(id=value), *rest] if len(args) == num_args and all(map(_is_index, rest)):
                self._check_value(value, args[0])
                return kind
        expected = "a value" + (" and the index of a dim" if num_args == 2 else "")
        raise self._refuse(f"the arguments of {name} must be {expected}", node)

    def _check_value(self, name: str, node: ast.expr) -> None:
        if name not in self.values:
            message = f"expected a value of the pattern, got '{name}'"
            raise self.text.refuse("SAGE321", message, node, did_you_mean(name, self.values))
        if name in self.optional:
            raise self._refuse(f"'{name}' may be absent", node)

    def _refuse(self, message: str, node: ast.expr, help: str = CONDITION_HELP) -> Refused:
        return self.text.refuse("SAGE321", message, node, help)


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 16
