"""Random small ops: typed expressions over operands of random shapes, with views, attrs and optional operands.

Conditions, rounding and whole-number functions of floats take exact values only (loads, sums, products), so that two
kernels cannot disagree by a unit in the last place on one side of a step.
"""

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

FLOATS, INTS = ("E", "f32"), ("i8", "i32", "i64")
LEADING = "..."


@dataclass(frozen=True)
class Value:
    """The text of an expression with its element type and dims; `is_exact`: every kernel returns the same bits."""

    text: str
    element: str
    dims: tuple[str, ...]
    is_exact: bool = True

    @property
    def is_float(self) -> bool:
        return self.element in FLOATS


@dataclass
class OpMaker:
    """Draws one op, `random_op`, by the grammar of the compute language."""

    rng: Random
    inputs: dict[str, Any] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    selected: set[str] = field(default_factory=set)  # dims of which A elements are selected

    def make(self) -> dict[str, Any]:
        rng = self.rng
        has_leading = rng.random() < 0.3
        pool = [LEADING, "H"] if has_leading else rng.sample(["T", "N", "H", "D"], rng.randint(1, 3))
        if has_leading and rng.random() < 0.4:
            pool.append("D")
        self.pool = pool
        for name in "abcd"[: rng.randint(1, 3)]:
            self._input(name)
        if rng.random() < 0.3:
            self._optional()
        if rng.random() < 0.4:
            self.attrs["factor"] = {"type": "f32", "default": rng.choice([0.5, 2.0, 0.0])}
        if rng.random() < 0.3:
            self.attrs["shift"] = {"type": "i32", "default": rng.choice([1, 2, 3]), "min": 1}
        for number in range(rng.randint(0, 2)):
            self._line(f"v{number}", self.value(2))
        outputs = {name: self._output(name) for name in ("y", "z")[: rng.choice([1, 1, 2])]}
        self._prune()
        fields = {"summary": "A random op.", "op_type": "ELEMENTWISE", "inputs": self.inputs, "outputs": outputs}
        fields |= {"attrs": self.attrs} if self.attrs else {}
        fields |= {"views": self.views} if self.views else {}
        if any(_mentions(line, "A") for line in self.lines):
            self.attrs["A"] = {"type": "dim"}
            fields |= {"attrs": self.attrs, "where": [f"A <= {dim}" for dim in sorted(self.selected)]}
        return fields | {"compute": "\n".join(self.lines)}

    def _prune(self) -> None:
        """Drops the values, views, attrs and operands that nothing uses."""
        used, kept = "", list[str]()
        for line in reversed(self.lines):
            target, _, value = line.partition(" = ")
            if not target.startswith("v") or _mentions(used, target):
                kept.insert(0, line)
                used += f" {value}"
        self.lines = kept
        outputs = {line.partition(" = ")[0] for line in kept}
        for name, text in reversed(self.views.items()):  # views of views come after those
            used += f" {text}" if name in outputs or _mentions(used, name) else ""
        self.views = {name: text for name, text in self.views.items() if name in outputs or _mentions(used, name)}
        self.attrs = {name: attr for name, attr in self.attrs.items() if _mentions(used, name)}
        used += " " + " ".join(self.views.values())
        self.inputs = {name: type_ for name, type_ in self.inputs.items() if name == "a" or _mentions(used, name)}

    # operands

    def _dims(self, at_least: int = 0) -> tuple[str, ...]:
        rng, pool = self.rng, self.pool
        dims = rng.sample(pool, rng.randint(min(at_least, len(pool)), len(pool)))
        if rng.random() < 0.7:  # mostly in one order
            dims.sort(key=pool.index)
        return tuple(sorted(dims, key=lambda dim: dim != LEADING))

    def _element(self) -> str:
        return self.rng.choice(["E", "E", "f32", "f32", "i32", "i64", "i8", "bool"])

    def _input(self, name: str) -> None:
        dims, element = self.pool if name == "a" else self._dims(), self._element()
        self._declare(name, element, tuple(dims))

    def _declare(self, name: str, element: str, dims: tuple[str, ...]) -> None:
        rng = self.rng
        if dims and rng.random() < 0.3 and dims[-1] != LEADING:
            *outer, last = dims
            self.inputs[name] = f"{element}[{', '.join([*outer, f'2*{last}'])}]"
            slices = {"low": f"0:{last}", "high": f"{last}:2*{last}", "even": f"0:2*{last}:2", "odd": f"1:2*{last}:2"}
            base = name
            if rng.random() < 0.4:  # views of a view of a wider operand
                base, first = f"{name}_half", rng.choice(["0", f"2*{last}"])
                self.inputs[name] = f"{element}[{', '.join([*outer, f'4*{last}'])}]"
                half = rng.choice([f"{first}:{first} + 2*{last}", f"0:4*{last}:2"])
                self.views[base] = f"{name}[{', '.join([*outer, half])}]"
            for part in rng.sample(sorted(slices), 2):
                view = f"{name}_{part}"
                self.views[view] = f"{base}[{', '.join([*outer, slices[part]])}]"
                self.values.append(Value(view, element, dims))
            return
        self.inputs[name] = f"{element}[{', '.join(dims)}]"
        self.values.append(Value(name, element, dims))

    def _optional(self) -> None:
        dims, element = self._dims(), self.rng.choice(["f32", "i32"])
        self.inputs["o"] = {"type": f"{element}[{', '.join(dims)}]", "optional": True}
        others = [v for v in self.values if v.element == element and set(dims) <= set(v.dims)]
        if others:
            other = self.rng.choice(others).text
            self.values.append(Value(f"optional(o, {other} + o, {other})", element, self._dims_of(other)))

    def _dims_of(self, text: str) -> tuple[str, ...]:
        return next(v.dims for v in self.values if v.text == text)

    def _line(self, name: str, value: Value) -> None:
        self.lines.append(f"{name} = {value.text}")
        self.values.append(Value(name, value.element, value.dims, value.is_exact))

    def _output(self, name: str) -> str:
        rng, value = self.rng, self.value(3)
        dims = list(value.dims)
        if rng.random() < 0.2:
            rng.shuffle(dims)
        dims.sort(key=lambda dim: dim != LEADING)
        last = dims[-1] if dims else LEADING
        if last != LEADING and rng.random() < 0.25:
            outer = ", ".join(dims[:-1])
            prefix = f"{outer}, " if outer else ""
            if len(dims) > 1 and dims[-2] != LEADING and rng.random() < 0.5:
                merged = ", ".join([*dims[:-2], f"{dims[-2]}*{last}"])
                self.views[f"{name}_whole"] = f"{name}[{merged}] as [{', '.join(dims)}]"
                self.lines.append(f"{name}_whole = {value.text}")
                return f"{value.element}[{merged}]"
            parts = rng.choice([(f"0:{last}", f"{last}:2*{last}"), (f"0:2*{last}:2", f"1:2*{last}:2")])
            other = value if rng.random() < 0.5 else self._negated(value)
            for number, (part, one) in enumerate(zip(parts, (value, other), strict=True)):
                self.views[f"{name}{number}"] = f"{name}[{prefix}{part}]"
                self.lines.append(f"{name}{number} = {one.text}")
            return f"{value.element}[{prefix}2*{last}]"
        self._line(name, value)
        return f"{value.element}[{', '.join(dims)}]"

    def _negated(self, value: Value) -> Value:
        text = f"not ({value.text})" if value.element == "bool" else f"-({value.text})"
        return Value(text, value.element, value.dims, value.is_exact)

    # expressions

    def value(self, depth: int) -> Value:
        """A tensor of any type and shape."""
        forms = [self._leaf, self._arithmetic, self._function, self._cast, self._compare, self._where, self._reduce]
        forms += [self._along, self._literal, self._dot]
        for _ in range(20):
            form = self._leaf if depth == 0 else self.rng.choice(forms)
            found = form(depth - 1)
            if found is not None:
                return found
        return self._leaf(0)

    def _leaf(self, depth: int) -> Value:
        return self.rng.choice(self.values)

    def _exact(self, value: Value) -> Value:
        return value if value.is_exact else self._leaf(0)

    def _joined(self, a: Value, b: Value) -> tuple[str, ...] | None:
        dims = dict.fromkeys([*a.dims, *b.dims])
        if LEADING in dims and not (set(a.dims) <= set(b.dims) or set(b.dims) <= set(a.dims)):
            return None
        return tuple(sorted(dims, key=lambda dim: dim != LEADING))

    def _pair(self, depth: int) -> tuple[Value, Value, tuple[str, ...]] | None:
        a = self.value(depth)
        others = [v for v in (self.value(depth), *self.values) if v.element == a.element]
        if not others:
            return None
        b = self.rng.choice(others[:3])
        dims = self._joined(a, b)
        return None if dims is None else (a, b, dims)

    def _arithmetic(self, depth: int) -> Value | None:
        pair = self._pair(depth)
        if pair is None or pair[0].element == "bool":
            return None
        a, b, dims = pair
        exact = a.is_exact and b.is_exact
        if a.is_float:
            op = self.rng.choice(["+", "-", "*", "/", "min", "max"])
        else:
            op = self.rng.choice(["+", "-", "*", "//", "%", "min", "max"])
        text = f"{op}({a.text}, {b.text})" if op in ("min", "max") else f"({a.text} {op} {b.text})"
        return Value(text, a.element, dims, exact)

    def _literal(self, depth: int) -> Value | None:
        """An operation with a number, an attr or a dim."""
        a, rng = self.value(depth), self.rng
        if a.element == "bool":
            return None
        dim = rng.choice([name for name in self.pool if name != LEADING] or ["1"])
        numbers = ["3", "2", f"({dim} // 2 + 1)", f"({dim} % 3 + 1)", f"{dim}"]
        numbers += ["shift", "(shift * 2)", "(shift // 2 + 1)"] if "shift" in self.attrs else []
        if a.is_float:
            numbers += ["0.5", "1.0e-3", f"({dim} / 2)", f"min({dim}, 3)", f"({dim} ** 2)"]
            numbers += ["factor", "(factor + 1.0)", "sqrt(abs(factor))"] if "factor" in self.attrs else []
            op = rng.choice(["+", "-", "*", "/", "**", "min", "max"])
        else:
            op = rng.choice(["+", "-", "*", "//", "%", "**", "min", "max"])
        number = rng.choice(["2", "3", "0.5", "2.5"] if op == "**" and a.is_float else ["2"] if op == "**" else numbers)
        if op in ("min", "max"):
            return Value(f"{op}({a.text}, {number})", a.element, a.dims, a.is_exact)
        left, right = (a.text, number) if rng.random() < 0.7 or op in ("**", "//", "%") else (number, a.text)
        if not a.is_float and op in ("//", "%") and rng.random() < 0.3:
            left, right = number, a.text  # zeros divide as well
        return Value(f"({left} {op} {right})", a.element, a.dims, a.is_exact and op != "**")

    def _function(self, depth: int) -> Value | None:
        a = self.value(depth)
        if a.element == "bool":
            return Value(f"(not {a.text})", "bool", a.dims)
        if not a.is_float:
            name = self.rng.choice(["abs", "relu", "-"])
        else:
            smooth = ["exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "erf"]
            name = self.rng.choice([*smooth, "abs", "relu", "-", *(["floor", "round"] if a.is_exact else [])])
        keeps = name in ("abs", "relu", "-", "floor", "round")
        return Value(f"{name}({a.text})", a.element, a.dims, a.is_exact and keeps)

    def _cast(self, depth: int) -> Value | None:
        a = self.value(depth)
        if a.element == "bool":
            return None
        if a.is_float and a.is_exact and self.rng.random() < 0.2:
            target = self.rng.choice(INTS)
            return Value(f"{target}(max(min({a.text}, 100), -100))", target, a.dims)
        targets = ["f32", "E", "f32"] if self._has_e() else ["f32"]
        target = self.rng.choice(targets if a.is_float or self.rng.random() < 0.5 else list(INTS))
        return Value(f"{target}({a.text})", target, a.dims, a.is_exact)

    def _has_e(self) -> bool:
        return any(isinstance(spec, str) and spec.startswith("E[") for spec in self.inputs.values())

    def _compare(self, depth: int) -> Value | None:
        pair = self._pair(depth)
        if pair is None:
            return None
        a, b, dims = pair
        if a.element == "bool":
            return Value(f"({a.text} {self.rng.choice(['and', 'or', '==', '!='])} {b.text})", "bool", dims)
        if not (a.is_exact and b.is_exact):
            return None
        op = self.rng.choice(["<", "<=", ">", ">=", "==", "!="])
        if self.rng.random() < 0.3:
            return Value(f"({a.text} {op} 1)", "bool", a.dims)
        return Value(f"({a.text} {op} {b.text})", "bool", dims)

    def _where(self, depth: int) -> Value | None:
        pair, conditions = self._pair(depth), [v for v in (self.value(depth), *self.values) if v.element == "bool"]
        if pair is None or not conditions:
            return None
        a, b, dims = pair
        condition = self.rng.choice(conditions)
        joined = self._joined(condition, Value("", "", dims))
        if joined is None:
            return None
        other = "0" if a.element != "bool" and self.rng.random() < 0.3 else b.text
        return Value(f"where({condition.text}, {a.text}, {other})", a.element, joined, a.is_exact and b.is_exact)

    def _reduce(self, depth: int) -> Value | None:
        a = self.value(depth)
        dims = [dim for dim in a.dims if dim != LEADING]
        if a.element == "bool" or not dims:
            return None
        dim, rng = self.rng.choice(dims), self.rng
        names = ["amax", "amin"] + (["sum", "mean"] if a.element == "f32" else ["sum"] if a.element in INTS else [])
        name = rng.choice(names)
        rest = tuple(one for one in a.dims if one != dim)
        return Value(f"{name}({a.text}, {dim})", a.element, rest, a.is_exact and name in ("amax", "amin"))

    def _along(self, depth: int) -> Value | None:
        """A scan, or the largest elements or their positions along a dim."""
        a = self.value(depth)
        dims = [dim for dim in a.dims if dim != LEADING]
        if a.element == "bool" or not dims:
            return None
        dim, rng = self.rng.choice(dims), self.rng
        if rng.random() < 0.6:
            names = ["cummax", "cummin"] + (["cumsum", "cumprod"] if a.element in ("f32", "i32", "i64") else [])
            name = rng.choice(names)
            return Value(f"{name}({a.text}, {dim})", a.element, a.dims, a.is_exact and name in ("cummax", "cummin"))
        if not a.is_exact or "A" in a.dims:
            return None
        self.selected.add(dim)
        rest = tuple("A" if one == dim else one for one in a.dims)
        name, element = rng.choice([("topk", a.element), ("topk_indices", "i32")])
        return Value(f"{name}({a.text}, {dim}, A)", element, rest)

    def _dot(self, depth: int) -> Value | None:
        pair = self._pair(depth)
        if pair is None or not pair[0].is_float:
            return None
        a, b, dims = pair
        shared = [dim for dim in a.dims if dim in b.dims and dim != LEADING]
        if not shared or (LEADING in b.dims and LEADING not in a.dims):
            return None
        dim = self.rng.choice(shared)
        return Value(f"dot({a.text}, {b.text}, {dim})", "f32", tuple(d for d in dims if d != dim), False)


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def random_op(seed: int | str) -> dict[str, Any]:
    """The fields of an op, as in a spec file."""
    return OpMaker(Random(seed)).make()
