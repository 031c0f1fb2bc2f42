"""Nodes of declared ops: the base of the generated op classes, with shape inference and cost formulas."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from sageLLM.runtime.core.errors import TypeMismatch, VerifyError
from sageLLM.runtime.core.ir.dims import Dim, Expr, evaluate, product
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.types import DTYPES, TensorType, TypePattern, bind, instantiate


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()
"""The default of a required attribute."""

AttrDefault: TypeAlias = "AttrValue | _Required | Callable[[Mapping[str, Any]], AttrValue]"
_ATTR_PYTHON: Mapping[str, tuple[type, ...]] = {
    "f32": (float, int),
    "i32": (int,),
    "bool": (bool,),
    "str": (str,),
    "dim": (int, Expr),
}


@dataclass(frozen=True, slots=True)
class AttrSpec:
    """Type, default and range of an attribute. `default` may be a function of the op's dims; None allows None."""

    type: str
    default: AttrDefault = REQUIRED
    min: float | None = None
    max: float | None = None
    choices: tuple[AttrValue, ...] | None = None

    def broken_rule(self, value: AttrValue) -> str | None:
        """The expectation that a value fails, such as "at least 1"; None for a valid one."""
        if value is None:
            return None if self.default is None else self.type
        if not isinstance(value, _ATTR_PYTHON[self.type]) or (isinstance(value, bool) and self.type != "bool"):
            return self.type
        if isinstance(value, (int, float)) and self.min is not None and not value >= self.min:
            return f"at least {self.min}"
        if isinstance(value, (int, float)) and self.max is not None and not value <= self.max:
            return f"at most {self.max}"
        if self.choices is not None and value not in self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return None


@dataclass(frozen=True, slots=True)
class Where:
    """A condition on an op's sizes and attributes, such as `Nq % Nkv == 0`.

    `test` receives dims, attributes and element types by name. It is deferred while a name in `text` is symbolic.
    """

    text: str
    test: Callable[[Mapping[str, Any]], bool]

    def why_not(self, env: Mapping[str, Any]) -> str | None:
        """The broken condition with the values of its names, or None if it holds or cannot be decided yet."""
        names = [name for name in _names(self.text) if name in env]
        if any(isinstance(env[name], Expr) for name in names) or self.test(env):
            return None
        return f"requires {self.text} ({', '.join(f'{name} = {env[name]}' for name in names)})"


class Inference(NamedTuple):
    """The result of inference for one use of an op: output types, all attributes, and the bindings of all names."""

    outputs: tuple[TensorType, ...]
    attrs: dict[str, AttrValue]
    env: dict[str, Any]


InferKey: TypeAlias = "tuple[Any, ...]"
Memo: TypeAlias = "MutableMapping[InferKey, Inference]"
"""Inferences by use. Layers repeat the same uses of an op, so a memo per graph saves most of the work."""


class OpNode(ExecutionNode):
    """A node of an op declared in the specs. Subclasses are generated: declarations and typed accessors.

    `inputs` contains the present operands in declared order. If one in the middle is absent, `metadata["operands"]`
    lists the names of those present. The formulas may use the op's dims and dim attributes, `R` (the product of the
    leading dims), `E_size` (bytes of an element of E), `has_NAME` (1 or 0 for an optional operand), `kv_size` and
    `kv_scale` (bytes of an element of the KV cache, and of the scale of a row there; by default those of E and 0), and
    symbols of the step such as KV, which the caller passes.
    """

    op: str  # a constant class attribute; not a ClassVar because it overrides a property of the base
    spec: ClassVar[str] = ""
    kind: ClassVar[OpTypeBase]
    tags: ClassVar[frozenset[str]] = frozenset()
    input_types: ClassVar[dict[str, TypePattern]]
    optional_inputs: ClassVar[frozenset[str]] = frozenset()
    output_types: ClassVar[dict[str, TypePattern]]
    attr_types: ClassVar[dict[str, AttrSpec]] = {}
    where: ClassVar[tuple[Where, ...]] = ()
    inplace: ClassVar[dict[str, str]] = {}
    flop_formula: ClassVar[Dim] = 0
    byte_formula: ClassVar[Dim] = 0

    @classmethod
    def infer(cls, inputs: Mapping[str, TensorType], attrs: Mapping[str, AttrValue]) -> dict[str, TensorType]:
        """Output types from operand types and attributes; TypeMismatch if these do not fit the declaration."""
        return dict(zip(cls.output_types, cls.resolve(inputs, attrs).outputs, strict=True))

    @classmethod
    def resolve(cls, inputs: Mapping[str, TensorType], attrs: Mapping[str, AttrValue]) -> Inference:
        """Output types, attributes with their defaults, and the bindings of all names; errors as in `infer`."""
        missing = [n for n in cls.input_types if n not in inputs and n not in cls.optional_inputs]
        if missing:
            raise TypeMismatch(f"{cls.op}: operand {missing[0]!r} is missing")
        cls._check_attr_names(attrs)
        env: dict[str, Any] = dict(cls._dim_attrs(attrs))
        bind(cls.input_types, inputs, env, op=cls.op)
        env["R"] = product(env.get("...", ()))
        full = cls._complete_attrs(attrs, env)
        named = full | env
        for where in cls.where:
            if (problem := where.why_not(named)) is not None:
                raise TypeMismatch(f"{cls.op}: {problem}")
        try:
            outputs = tuple(instantiate(pattern, env) for pattern in cls.output_types.values())
        except TypeMismatch as error:
            raise TypeMismatch(f"{cls.op}: output {error}") from None
        return Inference(outputs, full, env)

    @classmethod
    def resolve_refs(
        cls, refs: Mapping[str, TensorRef], attrs: Mapping[str, AttrValue], memo: Memo | None = None
    ) -> Inference:
        """The inference for the present operands, in declared order; `memo` shares the work among equal uses."""
        if memo is None:
            return cls.resolve({name: ref.type for name, ref in refs.items()}, attrs)
        key = _infer_key(cls, refs, attrs)
        if key not in memo:
            memo[key] = cls.resolve({name: ref.type for name, ref in refs.items()}, attrs)
        return memo[key]

    @classmethod
    def _check_attr_names(cls, attrs: Mapping[str, AttrValue]) -> None:
        for name in attrs:
            if name not in cls.attr_types:
                known = ", ".join(cls.attr_types) or "none"
                raise TypeMismatch(f"{cls.op}: unknown attribute {name!r}, expected {known}")

    @classmethod
    def _dim_attrs(cls, attrs: Mapping[str, AttrValue]) -> dict[str, Dim]:
        """The attributes that dim formulas may use, as far as they are known before the operands are matched."""
        values: dict[str, Dim] = {}
        for name, spec in cls.attr_types.items():
            value = attrs.get(name, spec.default if isinstance(spec.default, (int, Expr)) else None)
            if spec.type == "dim" and isinstance(value, (int, Expr)):
                values[name] = value
        return values

    @classmethod
    def _complete_attrs(cls, attrs: Mapping[str, AttrValue], env: Mapping[str, Any]) -> dict[str, AttrValue]:
        full: dict[str, AttrValue] = {}
        for name, spec in cls.attr_types.items():
            value = attrs.get(name, spec.default)
            if isinstance(value, _Required):
                raise TypeMismatch(f"{cls.op}: attribute {name!r} is missing")
            full[name] = value(env) if callable(value) else value
            if (expected := spec.broken_rule(full[name])) is not None:
                raise TypeMismatch(f"{cls.op}: attribute {name!r}: expected {expected}, got {full[name]!r}")
        return full

    @property
    def is_view(self) -> bool:
        """Whether the outputs are parts or reshapes of the first input's memory: no work, no new bytes."""
        return "view" in self.tags or self.kind.name == "VIEW"

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the present operands, in the order of `inputs`."""
        listed = self.metadata.get("operands")
        return tuple(listed) if listed is not None else tuple(self.input_types)[: len(self.inputs)]

    def input(self, name: str) -> TensorRef:
        """The operand of that name; KeyError if it is absent."""
        ref = self.optional_input(name)
        if ref is None:
            raise KeyError(f"{self.node_id}: operand {name!r} of {self.op} is absent")
        return ref

    def optional_input(self, name: str) -> TensorRef | None:
        """The operand of that name, or None if it is absent; KeyError if the op declares no such operand."""
        if name not in self.input_types:
            raise KeyError(f"{self.op}: unknown operand {name!r}")
        operands = self.operands
        return self.inputs[operands.index(name)] if name in operands else None

    def output(self, name: str) -> TensorRef:
        """The output of that name; KeyError if the op declares no such output."""
        names = tuple(self.output_types)
        if name not in names:
            raise KeyError(f"{self.op}: unknown output {name!r}")
        return self.outputs[names.index(name)]

    def inference(self, memo: Memo | None = None) -> Inference:
        """The inference for this node's operands."""
        return self.resolve_refs(dict(zip(self.operands, self.inputs, strict=True)), self.attrs, memo)

    def problems(self, memo: Memo | None = None) -> list[str]:
        """The mismatches between the node and its op's declaration, a sentence each."""
        if len(self.operands) != len(self.inputs):
            return [f"{self.node_id}: {self.op}: expected {len(self.operands)} operands, got {len(self.inputs)}"]
        try:
            expected = self.inference(memo).outputs
        except TypeMismatch as error:
            return [f"{self.node_id}: {error}"]
        if len(expected) != len(self.outputs):
            return [f"{self.node_id}: {self.op}: expected {len(expected)} outputs, got {len(self.outputs)}"]
        return [
            f"{self.node_id}: {self.op}: output {name!r}: expected {type_}, got {ref.type}"
            for name, ref, type_ in zip(self.output_types, self.outputs, expected, strict=True)
            if ref.dtype != type_.dtype or ref.shape != type_.shape
        ]

    def verify(self) -> None:
        """Raises VerifyError if operands, attributes or outputs do not fit the op's declaration."""
        if problems := self.problems():
            raise VerifyError(problems)

    def dims(self) -> dict[str, Dim | str]:
        """The bindings of the declaration's dims and element variables in this node; `R` is the leading size."""
        return {name: value for name, value in self.inference().env.items() if not isinstance(value, tuple)}

    def flops(self, env: Mapping[str, Dim] = {}, memo: Memo | None = None) -> Dim:
        """Floating-point operations, a formula while sizes are symbolic; env binds symbols of the step (KV, T, ...)."""
        return self._cost(self.flop_formula, env, memo)

    def bytes_moved(self, env: Mapping[str, Dim] = {}, memo: Memo | None = None) -> Dim:
        """Bytes read from and written to memory; env as in `flops`."""
        return self._cost(self.byte_formula, env, memo)

    def _cost(self, formula: Dim, env: Mapping[str, Dim], memo: Memo | None) -> Dim:
        if isinstance(formula, int):
            return formula
        return cost_of(type(self), formula, self.inference(memo), self.operands, env)


def cost_of(
    cls: type[OpNode], formula: Dim, inference: Inference, operands: tuple[str, ...], env: Mapping[str, Dim]
) -> Dim:
    """The value of a cost formula for one use of an op: the op's own names are bound first, then those of env.

    Two passes, because a dim of the op may be bound to a formula over symbols of the step: `T` of an op is `Td + Tp`.
    """
    names: dict[str, object] = {f"has_{name}": int(name in operands) for name in cls.optional_inputs}
    for name, value in inference.env.items():
        if isinstance(value, str):
            names[f"{name}_size"] = DTYPES[value]
        elif not isinstance(value, tuple):
            names[name] = value
    names.update((name, value) for name, value in env.items() if name not in names)
    names.setdefault("kv_size", names.get("E_size"))
    names.setdefault("kv_scale", 0)
    return evaluate(evaluate(formula, names), env)


def _infer_key(cls: type[OpNode], refs: Mapping[str, TensorRef], attrs: Mapping[str, AttrValue]) -> InferKey:
    """The memo key of an inference; equal keys mean equal inferences.

    It includes the Python types of the attributes, since 1, 1.0 and True compare equal.
    """
    types, values = tuple((ref.dtype, ref.shape) for ref in refs.values()), tuple(attrs.values())
    return cls, tuple(refs), types, tuple(attrs), values, tuple(map(type, values))


@lru_cache(maxsize=512)
def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)))
