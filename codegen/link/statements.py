"""Links the statements of a layout: each is a call of an op, of a block, or of the form `attend`, with typed values."""

import ast
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.link.config import compile_expression, render, type_of
from sageLLM.codegen.link.flatten import Placed
from sageLLM.codegen.link.weights import link_size
from sageLLM.codegen.model.layout import (
    PHASES,
    Attend,
    BlockCall,
    BlockDef,
    ConfigName,
    InputDef,
    OpCall,
    Phase,
    Statement,
    WeightDef,
)
from sageLLM.codegen.model.op import Attr, OpDef, Operand

_VALUE = re.compile(r"[a-z][a-z0-9_]{0,31}\Z")
_RESERVED = frozenset(
    {
        *("g", "c", "stage", "layer", "block", "kc", "vc", "ops", "own_ops", "dims", "true", "false"),
        *("range", "tuple", "num_rows", "call_block"),
    }
)
_CACHES = ("k_cache", "v_cache")
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


@dataclass(slots=True)
class BodyLinker:
    """Links statements in order; `values` grows with their results."""

    around: Surroundings
    values: dict[str, Value]
    is_block: bool
    used_weights: set[tuple[str | None, str]] = field(default_factory=set)
    assigned: list[str] = field(default_factory=list)

    def link(self, place: Placed[str]) -> Statement | None:
        """The statement, or None after its findings; its targets are then of unknown type."""
        text = place.text(place.value, self.around.sink)
        targets: list[ast.Name] = []
        try:
            targets, call = self._parse(text)
            statement = self._call(text, targets, call)
        except Refused:
            for target in targets:
                self._assign(target.id, Value(None))
            return None
        return statement

    def _parse(self, text: Text) -> tuple[list[ast.Name], ast.Call]:
        nodes = parse_statements(text)
        check_grammar(text, nodes[0])
        targets: list[ast.Name] = []
        call: ast.Call | None = None
        match nodes:
            case [ast.Assign(targets=[ast.Name() as target], value=ast.Call() as value)]:
                targets, call = [target], value
            case [ast.Assign(targets=[ast.Tuple(elts=elements)], value=ast.Call() as value)]:
                targets, call = [element for element in elements if isinstance(element, ast.Name)], value
        if call is None or not targets:
            raise text.refuse("SAGE220", "a statement is `names = op(...)`", None, "write one call per line")
        for target in targets:
            if not is_value_name(target.id):
                help = "use small letters, digits and `_`, beginning with a letter"
                raise text.refuse("SAGE204", f"'{target.id}' cannot name a value", target, help)
        return targets, call

    def _call(self, text: Text, targets: list[ast.Name], call: ast.Call) -> Statement:
        assert isinstance(call.func, ast.Name), "the grammar has calls of names only"
        name = call.func.id
        if name == "attend" and self.is_block:
            return self._attend(text, targets, call)
        if name in self.around.blocks and not self.is_block:
            return self._block_call(text, targets, call, name)
        if name not in self.around.ops:
            known = [*self.around.ops, *(["attend"] if self.is_block else self.around.blocks)]
            near = did_you_mean(name, known)
            raise text.refuse("SAGE221", f"unknown op '{name}'", call.func, near)
        op = self.around.ops[name]
        if op.op_type.startswith("COMM_"):
            help = "remove it: what a weight's `tp` says decides where ranks talk"
            raise text.refuse("SAGE243", f"a layout does not communicate, '{name}' does", call.func, help)
        args = [self._argument(text, node, operand) for node, operand in self._operands(text, call, op)]
        attrs = self._attrs(text, call, op)
        linked = self._op_call(text, tuple(target.id for target in targets), op, args, attrs, call)
        self._assign_all(text, targets, linked.types, call, is_partial=self._is_kept_partial(linked))
        return linked

    def _operands(self, text: Text, call: ast.Call, op: OpDef) -> list[tuple[ast.expr, Operand]]:
        needed = [operand for operand in op.inputs if not operand.optional]
        if not len(needed) <= len(call.args) <= len(op.inputs):
            names = ", ".join(operand.name for operand in op.inputs)
            message = f"{op.name} takes {_count(len(needed), len(op.inputs))} ({names}), got {len(call.args)}"
            raise text.refuse("SAGE222", message, call, f"see {op.ref}")
        return list(zip(call.args, op.inputs, strict=False))

    def _argument(self, text: Text, node: ast.expr, operand: Operand) -> str:
        if not isinstance(node, ast.Name):
            raise text.refuse(
                "SAGE220", f"'{operand.name}' wants the name of a value", node, "give a result a name first"
            )
        value = self._value(text, node)
        if value.is_optional and not operand.optional:
            assert value.weight is not None, "only weights are optional"
            message = f"'{node.id}' is absent unless {value.weight.when}, but '{operand.name}' needs a value"
            raise text.refuse("SAGE226", message, node, "give it to an optional operand, or drop its `when`")
        return node.id

    def _value(self, text: Text, node: ast.Name) -> Value:
        """What the name stands for; an input of the step counts as known."""
        found = self.values.get(node.id)
        if found is None and node.id in self.around.inputs:
            given = self.around.inputs[node.id]
            if not given.is_per_layer or self.is_block:
                found = Value(given.type)
        if found is None:
            known = [*self.values, *(name for name, given in self.around.inputs.items() if not given.is_per_layer)]
            raise text.refuse("SAGE223", f"'{node.id}' is not defined here", node, did_you_mean(node.id, known))
        if found.is_partial:
            help = "return it: the program completes the sum over the ranks; nothing else may read it"
            raise text.refuse(
                "SAGE241", f"'{node.id}' is a rank's part of a sum and is used before the sum", node, help
            )
        if found.weight is not None:
            self.used_weights.add((found.weight.block, found.weight.name))
        return found

    def _attrs(self, text: Text, call: ast.Call, op: OpDef) -> list[tuple[str, str]]:
        attrs: list[tuple[str, str]] = []
        for given in call.keywords:
            attr = op.attr(given.arg or "")
            if attr is None:
                help = did_you_mean(given.arg or "", [known.name for known in op.attrs])
                raise text.refuse("SAGE225", f"{op.name} has no attr '{given.arg}'", given, help)
            self._check_attr(text, given.value, attr)
            attrs.append((attr.name, render(given.value, lambda name: f"c.{name}")))
        missing = [attr.name for attr in op.attrs if attr.is_required and attr.name not in dict(attrs)]
        if missing:
            raise text.refuse("SAGE225", f"{op.name} needs the attr '{missing[0]}'", call, f"write {missing[0]}=...")
        return attrs

    def _check_attr(self, text: Text, node: ast.expr, attr: Attr) -> None:
        start, end = text.offsets(node)
        compile_expression(text.part(start, end), self.around.config)
        found = type_of(node, self.around.config)
        if found not in _FITS[attr.type]:
            raise text.refuse("SAGE225", f"'{attr.name}' wants {attr.type}, '{ast.unparse(node)}' is {found}", node)
        names = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        nullable = [name for name in names if name in self.around.config and self.around.config[name].is_optional]
        if nullable and not (attr.optional and isinstance(node, ast.Name)):
            message = f"'{nullable[0]}' may be null, but '{attr.name}' needs a value"
            raise text.refuse("SAGE225", message, node, f"give '{nullable[0]}' a default that is not null")

    def _op_call(
        self,
        text: Text,
        targets: tuple[str, ...],
        op: OpDef,
        args: list[str],
        attrs: list[tuple[str, str]],
        call: ast.Call,
    ) -> OpCall:
        names = [*args, *[None] * (len(op.inputs) - len(args))]
        types = self._infer(text, op, names, dict(attrs), call, lambda type_: type_)
        linked = OpCall(targets, op, tuple(names), tuple(attrs), types)
        return self._with_reduction(text, linked, call)

    def _infer(
        self,
        text: Text,
        op: OpDef,
        args: list[str | None],
        attrs: Mapping[str, str],
        call: ast.Call,
        seen_as: Callable[[ValueType], ValueType],
    ) -> tuple[ValueType, ...]:
        """The result types of an op; raises Refused where an operand does not fit."""
        match_ = Match(op)
        for attr in op.attrs:
            if attr.type == "dim" and attr.name in attrs:
                node = next(given.value for given in call.keywords if given.arg == attr.name)
                start, end = text.offsets(node)
                match_.dims[attr.name] = link_size(text.part(start, end), self.around.config)
        for operand, name in zip(op.inputs, args, strict=True):
            type_ = self._type_of_name(name) if name is not None else None
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

    def _type_of_name(self, name: str) -> ValueType | None:
        if name in self.values:
            return self.values[name].type
        found = self.around.inputs.get(name)
        return found.type if found else None

    def _with_reduction(self, text: Text, linked: OpCall, call: ast.Call) -> OpCall:
        """Notes what completes the result when its weights are divided; refuses what could not be completed."""
        weights = [
            (operand, value.weight)
            for operand, name in zip(linked.op.inputs, linked.args, strict=True)
            if name in self.values and (value := self.values[name]).weight is not None and value.weight is not None
        ]
        reduce_: Literal["all_reduce", "all_gather"] | None = None
        shard_op: OpDef | None = None
        for operand, weight in weights:
            if weight.shard is None or weight.shard.kind == "first":
                continue
            wanted = self._collective(linked.op, operand, weight)
            if weight.shard.then != wanted:
                message = f"'{weight.name}' is divided along dim {weight.shard.dim}, so its `tp` needs {_then(wanted)}"
                raise text.refuse(
                    "SAGE240", message, call, f"`tp: {{shard: {weight.shard.dim}}}` says how it is completed"
                )
            reduce_ = wanted
            if weight.shard.kind == "vocab" and wanted == "all_reduce":
                shard_op = self._shard_op(text, linked.op, call)
        for _, weight in weights:
            is_first = weight.shard is not None and weight.shard.kind == "first"
            if is_first != (reduce_ == "all_reduce" and (weight.shard is None or is_first)):
                raise text.refuse("SAGE242", *self._bias_words(weight, is_first, call))
        return replace(linked, reduce=reduce_, shard_op=shard_op)

    def _bias_words(self, weight: WeightDef, is_first: bool, call: ast.Call) -> tuple[str, ast.AST, str]:
        if is_first:
            return (
                f"'{weight.name}' is on rank 0 only, but this result is no sum over ranks",
                call,
                "drop `keep: first`",
            )
        return f"'{weight.name}' would be added once per rank", call, "write `tp: {keep: first}`"

    def _collective(self, op: OpDef, operand: Operand, weight: WeightDef) -> Literal["all_reduce", "all_gather"] | None:
        """What completes the result: a sum where the divided dim is contracted, a gather where it stays whole."""
        assert weight.shard is not None, "asked of divided weights only"
        dim = operand.type.dims[weight.shard.dim]
        is_kept = any(set(dim.symbols) & set(size.symbols) for output in op.outputs for size in output.type.dims)
        if not is_kept:
            return "all_reduce"
        return "all_gather" if weight.shard.kind == "vocab" else None

    def _shard_op(self, text: Text, op: OpDef, call: ast.Call) -> OpDef:
        found = self.around.ops.get(f"{op.name}_shard")
        if found is None or found.attr("first") is None:
            message = f"no op '{op.name}_shard' with an attr 'first' looks up a divided table"
            raise text.refuse("SAGE240", message, call, "add it to the ops, or do not divide the table")
        return found

    def _is_kept_partial(self, linked: OpCall) -> bool:
        """In a block a sum over ranks is left to the program; the program's own calls complete theirs at once."""
        return self.is_block and linked.reduce is not None

    def _attend(self, text: Text, targets: list[ast.Name], call: ast.Call) -> Attend:
        if len(targets) != 1 or len(call.args) != 3:
            raise text.refuse(
                "SAGE222", "attend is `o = attend(q, k, v)`", call, "attrs of the attention op may follow"
            )
        store_op = self.around.ops.get("kv_store")
        if store_op is None or set(self.around.attend) != set(PHASES):
            raise Refused  # reported with the phases
        for name in (*_CACHES, "slots"):
            if name not in self.around.inputs:
                message = f"attend reads '{name}', which specs/inputs.yaml does not declare"
                raise text.refuse("SAGE222", message, call, "declare it there")
        names = [self._argument(text, node, store_op.inputs[0]) for node in call.args]
        store_args: list[str | None] = [names[1], names[2], *_CACHES, "slots"]
        store_types = self._infer(text, store_op, store_args, {}, call, lambda type_: type_)
        store = OpCall(("kc", "vc"), store_op, tuple(store_args), (), store_types)
        by_phase: dict[Phase, OpCall] = {}
        for phase in PHASES:
            op = self.around.attend[phase]
            attrs = self._attrs(text, call, op)
            args = self._attention_args(text, op, names[0], call)
            types = self._infer(
                text, op, args, dict(attrs), call, _in_decode if phase == "decode" else lambda type_: type_
            )
            shown = {"k_cache": "kc", "v_cache": "vc"}
            renamed = tuple(shown.get(name, name) if name is not None else None for name in args)
            types = tuple(_from_decode(type_) for type_ in types) if phase == "decode" else types
            by_phase[phase] = OpCall((targets[0].id,), op, renamed, tuple(attrs), types)
        self._assign_all(text, targets, by_phase["prefill"].types, call, is_partial=False)
        return Attend(targets[0].id, store, by_phase)

    def _attention_args(self, text: Text, op: OpDef, q: str, call: ast.Call) -> list[str | None]:
        args: list[str | None] = [q]
        for operand in op.inputs[1:]:
            if operand.name not in self.around.inputs and not operand.optional:
                message = f"the input '{operand.name}' of {op.name} is not among specs/inputs.yaml"
                raise text.refuse("SAGE229", message, call, did_you_mean(operand.name, self.around.inputs))
            args.append(operand.name if operand.name in self.around.inputs else None)
        return args

    def _block_call(self, text: Text, targets: list[ast.Name], call: ast.Call, name: str) -> BlockCall:
        block = self.around.blocks[name]
        if block is None:
            raise Refused
        if call.keywords or len(call.args) != len(block.args):
            message = f"block '{name}' takes {_count(len(block.args), len(block.args))} ({', '.join(block.args)})"
            raise text.refuse("SAGE222", message, call)
        args: list[str] = []
        for node, (arg, wanted) in zip(call.args, block.args.items(), strict=True):
            args.append(self._argument(text, node, Operand(arg, wanted)))
            type_ = self._type_of_name(args[-1])
            if type_ is None:
                raise Refused
            if type_ != wanted:
                message = f"block '{name}': '{args[-1]}' is {type_}, '{arg}' is {wanted}"
                raise text.refuse("SAGE224", message, node)
        self._assign_all(text, targets, block.result_types, call, is_partial=False)
        names = tuple(target.id for target in targets)
        reduced = tuple(name for name, is_partial in zip(names, block.partial, strict=True) if is_partial)
        return BlockCall(names, name, tuple(args), block.result_types, reduced)

    def _assign_all(
        self, text: Text, targets: list[ast.Name], types: tuple[ValueType, ...], call: ast.Call, *, is_partial: bool
    ) -> None:
        if len(targets) != len(types):
            raise text.refuse("SAGE222", f"the call gives {len(types)} results, {len(targets)} are named", call)
        for target, type_ in zip(targets, types, strict=True):
            self._assign(target.id, Value(type_, is_partial=is_partial))

    def _assign(self, name: str, value: Value) -> None:
        self.values[name] = value
        self.assigned.append(name)


@dataclass(slots=True)
class Match:
    """The dims and element types of one op, bound operand by operand. The op's symbols are marked with a dot."""

    op: OpDef
    dims: dict[str, Size] = field(default_factory=dict)
    elements: dict[str, str] = field(default_factory=dict)
    leading: tuple[Size, ...] | None = None

    def why_not(self, operand: Operand, actual: ValueType) -> str | None:
        """Why a value does not fit an operand, or None after binding what it tells."""
        wanted = operand.type
        element = self._element(wanted.element, actual.element)
        if element is not None:
            return element
        dims, given = wanted.dims, actual.dims
        if dims[:1] == (LEADING,):
            cut = len(given) - len(dims) + 1
            if cut < 0 or (self.leading is not None and self.leading != given[:cut]):
                return f"want {wanted}"
            self.leading, dims, given = given[:cut], dims[1:], given[cut:]
        if len(dims) != len(given):
            return f"want {wanted}"
        for dim, size in zip(dims, given, strict=True):
            problem = self._dim(dim, size)
            if problem is not None:
                return f"want {operand.name} {wanted} with {problem}"
        return None

    def _element(self, wanted: str, actual: str) -> str | None:
        if wanted in DTYPES:
            return None if wanted == actual else f"want {wanted}"
        known = self.elements.setdefault(wanted, actual)
        if known != actual:
            return f"want {wanted} = {known}"
        allowed = self.op.elements.get(wanted, ())
        return f"want {' or '.join(allowed)}" if actual != "E" and actual not in allowed else None

    def _dim(self, wanted: Size, size: Size) -> str | None:
        marked = wanted.substitute({name: self.dims.get(name, Size.symbol(f".{name}")) for name in wanted.symbols})
        unknown = [symbol for symbol in marked.symbols if symbol.startswith(".")]
        if not unknown:
            return None if marked == size else f"{wanted} = {_shown(marked)}, got {_shown(size)}"
        solved = marked.solve(unknown[0], size) if len(unknown) == 1 else None
        if solved is None:
            return f"{wanted}, which {_shown(size)} does not determine"
        self.dims[unknown[0][1:]] = solved
        return None

    def result(self, type_: ValueType) -> ValueType:
        """The type of an output."""
        dims: list[Size] = []
        for dim in type_.dims:
            if dim == LEADING:
                dims += self.leading or ()
            else:
                dims.append(Size(dim.substitute(self.dims).terms))
        return ValueType(self.elements.get(type_.element, type_.element), tuple(dims))


def _in_decode(type_: ValueType) -> ValueType:
    """In decode every sequence has one row: T is B."""
    return ValueType(type_.element, tuple(Size(dim.substitute({"T": Size.symbol("B")}).terms) for dim in type_.dims))


def _from_decode(type_: ValueType) -> ValueType:
    return ValueType(type_.element, tuple(Size(dim.substitute({"B": Size.symbol("T")}).terms) for dim in type_.dims))


def _shown(size: Size) -> str:
    return str(Size(size.terms))


def _count(least: int, most: int) -> str:
    if least == most:
        return f"{most} value" if most == 1 else f"{most} values"
    return f"{least} to {most} values"


def _then(wanted: str | None) -> str:
    return f"`then: {wanted}`" if wanted else "no `then`"
