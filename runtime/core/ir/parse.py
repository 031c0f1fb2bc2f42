"""Reads the text form of execution graphs back; the form is described in `sageLLM.runtime.core.ir.text`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import Dim, parse_dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode

KEYWORDS = ("graph", "input", "weight", "return", "members")
LEVELS = ("block", "kernel")
STAGES = ("prefill", "decode", "hybrid")
PHASES = ("prefill", "decode", "comm")

_Item = TypeVar("_Item")
_SPACE = re.compile(r" *")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"-?(?:inf|nan|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_DIMS = re.compile(r"[^\]]*")
_CONSTANTS: Mapping[str, bool | None] = {"True": True, "False": False, "None": None}


def parse_text(text: str, op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> ExecutionGraph:
    """The graph that a text describes. ParseError gives line and column of what is not understood.

    A line that begins with # is a comment.
    """
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip() and line[0] != "#"]
    if not lines:
        raise ParseError("no graph: the text is empty")
    parser = _Parser(_Scanner(lines[0][1], lines[0][0]), op_types, ops)
    for number, line in lines[1:]:
        parser.statement(_Scanner(line, number))
    parser.graph.reindex()
    return parser.graph


class _Scanner:
    """A cursor in one line."""

    def __init__(self, line: str, number: int) -> None:
        self.line, self.line_number, self.at = line.rstrip(), number, 0

    def error(self, message: str, at: int | None = None) -> ParseError:
        return ParseError(message, self.line_number, (self.at if at is None else at) + 1)

    def skip(self) -> None:
        self.at += len(self.match(_SPACE) or "")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.line, self.at)
        return found.group() if found else None

    def take(self, text: str) -> bool:
        """Move past a sign, with the spaces around it, if it comes next."""
        self.skip()
        if not self.line.startswith(text, self.at):
            return False
        self.at += len(text)
        self.skip()
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise self.error(f"want {text!r}, got {self.rest()}")

    def rest(self) -> str:
        return repr(self.line[self.at : self.at + 20]) if self.at < len(self.line) else "the end of the line"

    def is_done(self) -> bool:
        self.skip()
        return self.at == len(self.line)

    def word(self, what: str) -> str:
        found = self.match(_WORD)
        if found is None:
            raise self.error(f"want {what}, got {self.rest()}")
        self.at += len(found)
        return found

    def name(self, what: str) -> str:
        return self.string() if self.line.startswith('"', self.at) else self.word(what)

    def string(self) -> str:
        found = self.match(_STRING)
        try:
            value = json.loads(found or "")
        except ValueError:
            raise self.error("a string that does not end or holds a bad escape") from None
        self.at += len(found or "")
        return str(value)

    def number(self) -> int | float:
        found = self.match(_NUMBER)
        if found is None:
            raise self.error(f"want a number, got {self.rest()}")
        self.at += len(found)
        return int(found) if found.lstrip("-").isdigit() else float(found)

    def integer(self) -> int:
        start = self.at
        value = self.number()
        if not isinstance(value, int):
            raise self.error("want an integer", start)
        return value

    def choice(self, what: str, choices: tuple[str, ...]) -> str:
        start = self.at
        found = self.word(what)
        if found not in choices:
            raise self.error(f"{found!r} is no {what}, want {', '.join(choices)}", start)
        return found

    def items(self, item: Callable[[], _Item], close: str) -> list[_Item]:
        """Comma-separated items up to a closing sign."""
        found: list[_Item] = []
        while not self.take(close):
            if found:
                self.expect(",")
            found.append(item())
        return found

    def names(self) -> list[str]:
        self.expect("[")
        return self.items(lambda: self.name("a name"), "]")

    def json(self) -> dict[str, Any]:
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.line, self.at)
        except ValueError:
            raise self.error("metadata is not JSON") from None
        if not isinstance(value, dict):
            raise self.error("metadata is not a JSON object")
        return value

    def dim(self, text: str, at: int) -> Dim:
        try:
            return parse_dim(text.strip())
        except IRError:
            raise self.error(f"{text.strip()!r} is not a dim formula", at) from None

    def shape(self) -> tuple[Dim, ...]:
        self.expect("[")
        text = self.match(_DIMS) or ""
        sizes: list[Dim] = []
        for part in text.split(",") if text.strip() else []:
            sizes.append(self.dim(part, self.at))
            self.at += len(part) + 1
        self.at -= 1 if sizes else 0
        self.expect("]")
        return tuple(sizes)

    def value(self) -> AttrValue:
        if self.take("("):
            return tuple(self.items(self.value, ")"))
        if self.line.startswith('"', self.at):
            return self.string()
        if self.take("`"):
            end = self.line.find("`", self.at)
            if end < 0:
                raise self.error("a dim formula that does not end")
            size = self.dim(self.line[self.at : end], self.at)
            self.at = end + 1
            return size
        word = self.match(_WORD) or ""
        if word in _CONSTANTS:
            self.at += len(word)
            return _CONSTANTS[word]
        return self.number()


class _Parser:
    def __init__(self, scan: _Scanner, op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> None:
        self.op_types, self.ops = op_types, ops
        self.known: dict[str, TensorRef] = {}
        self.graph = self._header(scan)

    def statement(self, scan: _Scanner) -> None:
        scan.skip()
        start = scan.at
        word = scan.match(_WORD)
        if word not in KEYWORDS or word == "graph":
            return self._node(scan)
        scan.at += len(word)
        scan.skip()
        if word == "input":
            self._declare(scan, self.graph.inputs)
        elif word == "weight":
            self._declare(scan, self.graph.weights)
        elif word == "return":
            self.graph.outputs = [self._ref(scan)]
            while scan.take(","):
                self.graph.outputs.append(self._ref(scan))
        else:
            phase = scan.choice("set", PHASES)
            scan.skip()
            setattr(self.graph, f"{phase}_nodes", set(scan.names()))
        if not scan.is_done():
            raise scan.error(f"nothing more belongs to the {scan.line[start : start + len(word)]} line")
        return None

    def _header(self, scan: _Scanner) -> ExecutionGraph:
        scan.expect("graph ")
        graph = ExecutionGraph(scan.name("the graph's name"))
        while not scan.is_done():
            key = scan.choice("fact", ("level", "stage", "layers"))
            scan.expect("=")
            if key == "layers":
                graph.num_layers = scan.integer()
            else:
                setattr(graph, key, scan.choice(key, LEVELS if key == "level" else STAGES))
        return graph

    def _declare(self, scan: _Scanner, table: dict[str, TensorRef]) -> None:
        start = scan.at
        ref = _declared(scan)
        if ref.name in table:
            raise scan.error(f"{ref.name!r} is declared twice", start)
        table[ref.name] = self.known[ref.name] = ref

    def _ref(self, scan: _Scanner) -> TensorRef:
        """A value that is read, with or without its type."""
        start = scan.at
        name = scan.name("a value")
        if not scan.take(":"):
            if name not in self.known:
                raise scan.error(f"{name!r} needs a type here", start)
            return self.known[name]
        self.known[name] = _typed(scan, name)
        return self.known[name]

    def _node(self, scan: _Scanner) -> None:
        """Names on the left enter after the operands are read: a node may overwrite a value of another type."""
        start = scan.at
        outputs = _results(scan)
        kind = self._callee(scan)
        scan.expect("(")
        inputs = scan.items(lambda: self._ref(scan), ")")
        self.known.update((ref.name, ref) for ref in outputs)
        node = _new_node(kind, outputs, inputs)
        if scan.take("{"):
            node.attrs = dict(scan.items(lambda: _attr(scan), "}"))
        given = self._facts(scan, node) if scan.take("@") else set()
        if not scan.is_done():
            raise scan.error(f"nothing more belongs to a node, got {scan.rest()}")
        if not outputs and "id" not in given:
            raise scan.error("a node without outputs needs an id", start)
        self._add(scan, node, set(node.dependencies) if "needs" in given else None, start)

    def _callee(self, scan: _Scanner) -> type[OpNode] | OpTypeBase:
        start = scan.at
        name = scan.word("an op")
        if name.isupper():
            return self._op_type(scan, name, start)
        if name not in self.ops:
            raise scan.error(f"no op {name!r}", start)
        return self.ops[name]

    def _op_type(self, scan: _Scanner, name: str, start: int) -> OpTypeBase:
        if name not in self.op_types.__members__:
            raise scan.error(f"no op type {name!r}", start)
        return self.op_types[name]

    def _facts(self, scan: _Scanner, node: ExecutionNode) -> set[str]:
        """Fill in what stands after the `@`; the keys that it gives."""
        readers: dict[str, tuple[str, Callable[[], Any]]] = {
            "id": ("node_id", lambda: scan.name("an id")),
            "type": ("op_type", lambda: self._op_type(scan, scan.word("an op type"), scan.at)),
            "layer": ("layer_id", scan.integer),
            "block": ("block", lambda: scan.name("a block")),
            "device": ("device_id", scan.integer),
            "stream": ("stream_id", scan.integer),
            "time_us": ("estimated_time_us", lambda: float(scan.number())),
            "bytes": ("memory_bytes", scan.integer),
            "origins": ("origins", lambda: tuple(scan.names())),
            "after": ("dependencies", lambda: set(scan.names())),
            "needs": ("dependencies", lambda: set(scan.names())),
            "meta": ("metadata", scan.json),
        }
        key = ""
        given: set[str] = set()
        while key != "meta" and not scan.is_done():
            key = scan.choice("fact", tuple(readers))
            scan.expect("=")
            field, read = readers[key]
            setattr(node, field, read())
            given.add(key)
        return given

    def _add(self, scan: _Scanner, node: ExecutionNode, needs: set[str] | None, start: int) -> None:
        try:
            self.graph.add_node(node)
        except IRError as error:
            raise scan.error(str(error), start) from None
        if needs is not None:
            node.dependencies = needs


def _declared(scan: _Scanner) -> TensorRef:
    """A value with its type."""
    name = scan.name("a value")
    scan.expect(":")
    return _typed(scan, name)


def _typed(scan: _Scanner, name: str) -> TensorRef:
    dtype = scan.name("an element type")
    shape = scan.shape()
    device_follows = re.compile(r"@-?\d").match(scan.line, scan.at) is not None and scan.take("@")
    return TensorRef(name, shape, dtype, scan.integer() if device_follows else 0)


def _results(scan: _Scanner) -> list[TensorRef]:
    """What stands on the left of a node's `=`."""
    if scan.take("()"):
        scan.expect("=")
        return []
    found = [_declared(scan)]
    while not scan.take("="):
        scan.expect(",")
        found.append(_declared(scan))
    return found


def _new_node(kind: type[OpNode] | OpTypeBase, outputs: list[TensorRef], inputs: list[TensorRef]) -> ExecutionNode:
    node_id = outputs[0].name if outputs else ""
    if isinstance(kind, OpTypeBase):
        return ExecutionNode(node_id, kind, inputs, outputs)
    return kind(node_id, kind.kind, inputs, outputs)


def _attr(scan: _Scanner) -> tuple[str, AttrValue]:
    name = scan.name("an attribute")
    scan.expect("=")
    return name, scan.value()
