"""Parser of the text form of execution graphs; `sageLLM.runtime.core.ir.text` describes the form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.scanner import WORD, Scanner

KEYWORDS = ("graph", "input", "weight", "return", "members")
LEVELS = ("block", "kernel")
STAGES = ("prefill", "decode", "hybrid")
PHASES = ("prefill", "decode", "comm")


def parse_text(text: str, op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> ExecutionGraph:
    """The graph of a text; lines that begin with # are comments. Raises ParseError with line and column."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip() and line[0] != "#"]
    if not lines:
        raise ParseError("expected a graph, got an empty text")
    parser = _Parser(Scanner(lines[0][1], lines[0][0]), op_types, ops)
    for number, line in lines[1:]:
        parser.statement(Scanner(line, number))
    parser.graph.reindex()
    return parser.graph


class _Parser:
    def __init__(self, scan: Scanner, op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> None:
        self.op_types, self.ops = op_types, ops
        self.known: dict[str, TensorRef] = {}
        self.graph = self._header(scan)

    def statement(self, scan: Scanner) -> None:
        scan.skip()
        start = scan.at
        word = scan.match(WORD)
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
            line = scan.line[start : start + len(word)]
            raise scan.error(f"expected the end of the {line} line, got {scan.rest()}")
        return None

    def _header(self, scan: Scanner) -> ExecutionGraph:
        scan.expect("graph ")
        graph = ExecutionGraph(scan.name("the graph's name"))
        while not scan.is_done():
            key = scan.choice("key", ("level", "stage", "layers"))
            scan.expect("=")
            if key == "layers":
                graph.num_layers = scan.integer()
            else:
                setattr(graph, key, scan.choice(key, LEVELS if key == "level" else STAGES))
        return graph

    def _declare(self, scan: Scanner, table: dict[str, TensorRef]) -> None:
        start = scan.at
        ref = _declared(scan)
        if ref.name in table:
            raise scan.error(f"{ref.name!r} is already declared", start)
        table[ref.name] = self.known[ref.name] = ref

    def _ref(self, scan: Scanner) -> TensorRef:
        """An operand, with or without its type."""
        start = scan.at
        name = scan.name("a value")
        if not scan.take(":"):
            if name not in self.known:
                raise scan.error(f"the first use of {name!r} must have a type", start)
            return self.known[name]
        self.known[name] = _typed(scan, name)
        return self.known[name]

    def _node(self, scan: Scanner) -> None:
        start = scan.at
        outputs = _results(scan)
        kind = self._callee(scan)
        scan.expect("(")
        inputs = scan.items(lambda: self._ref(scan), ")")
        # Results are entered after the operands: a node may redefine one of its operands with another type.
        self.known.update((ref.name, ref) for ref in outputs)
        node = _new_node(kind, outputs, inputs)
        if scan.take("{"):
            node.attrs = dict(scan.items(lambda: _attr(scan), "}"))
        keys = self._facts(scan, node) if scan.take("@") else set()
        if not scan.is_done():
            raise scan.error(f"expected the end of the node, got {scan.rest()}")
        if not outputs and "id" not in keys:
            raise scan.error("a node without outputs must have an id", start)
        self._add(scan, node, set(node.dependencies) if "needs" in keys else None, start)

    def _callee(self, scan: Scanner) -> type[OpNode] | OpTypeBase:
        start = scan.at
        name = scan.word("an op")
        if name.isupper():
            return self._op_type(scan, name, start)
        if name not in self.ops:
            raise scan.error(f"unknown op {name!r}", start)
        return self.ops[name]

    def _op_type(self, scan: Scanner, name: str, start: int) -> OpTypeBase:
        if name not in self.op_types.__members__:
            raise scan.error(f"unknown op type {name!r}", start)
        return self.op_types[name]

    def _facts(self, scan: Scanner, node: ExecutionNode) -> set[str]:
        """Sets the fields of a node that follow the `@`; returns their keys."""
        fields: dict[str, tuple[str, Callable[[], Any]]] = {
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
        keys: set[str] = set()
        while key != "meta" and not scan.is_done():
            key = scan.choice("key", tuple(fields))
            scan.expect("=")
            field, read = fields[key]
            setattr(node, field, read())
            keys.add(key)
        return keys

    def _add(self, scan: Scanner, node: ExecutionNode, needs: set[str] | None, start: int) -> None:
        try:
            self.graph.add_node(node)
        except IRError as error:
            raise scan.error(str(error), start) from None
        if needs is not None:  # an explicit list replaces the dependencies that add_node derived
            node.dependencies = needs


def _declared(scan: Scanner) -> TensorRef:
    """A value with its type."""
    name = scan.name("a value")
    scan.expect(":")
    return _typed(scan, name)


def _typed(scan: Scanner, name: str) -> TensorRef:
    dtype = scan.name("an element type")
    shape = scan.shape()
    device_follows = re.compile(r"@-?\d").match(scan.line, scan.at) is not None and scan.take("@")
    return TensorRef(name, shape, dtype, scan.integer() if device_follows else 0)


def _results(scan: Scanner) -> list[TensorRef]:
    """The results to the left of a node's `=`."""
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


def _attr(scan: Scanner) -> tuple[str, AttrValue]:
    name = scan.name("an attribute")
    scan.expect("=")
    return name, scan.value()
