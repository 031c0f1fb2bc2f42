"""Parses spec expressions with Python's own parser and an allowlist of syntax nodes.

Nothing is ever evaluated, so a spec cannot run code. Length, depth and numbers are bounded before the tree is used.
"""

import ast
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.expr.constants import MAX_NUMBER, OutOfRange, constant
from sageLLM.codegen.load import Entry

MAX_LENGTH = 4000
MAX_DEPTH = 32
_ALLOWED = (
    ast.Module, ast.Expression, ast.Expr, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Call,
    ast.keyword,
    ast.Tuple, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_REFUSED_WORDS = {
    ast.Attribute: "attributes are not supported",
    ast.Subscript: "subscripts are not supported",
    ast.Lambda: "function definitions are not supported",
    ast.IfExp: "`if` expressions are not supported",
    ast.Starred: "starred names are not supported",
    ast.JoinedStr: "f-strings are not supported",
}
_REMEDIES: dict[type[ast.AST], str] = {
    ast.Attribute: "call a named function, e.g. sum(v, H)",
    ast.Subscript: "define the slice under `views`",
    ast.IfExp: "use where(condition, a, b), or optional(name, with, without)",
}


class Refused(Exception):
    """Raised after a finding is reported, to abandon the statement that contains it."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of spec text with its source location and the sink of its findings."""

    value: str
    locate: Callable[[int, int], Span]
    sink: Sink

    @classmethod
    def of(cls, value: str, entry: Entry[Any], path: tuple[str | int, ...], sink: Sink, start: int = 0) -> "Text":
        """`value`, located in the entry's text at `path`, `start` characters in."""
        return cls(value, lambda offset, width: entry.text_span(path, start + offset, width), sink)

    @classmethod
    def of_key(cls, value: str, entry: Entry[Any], path: tuple[str | int, ...], sink: Sink) -> "Text":
        """The key at the end of `path`."""
        return cls(value, lambda offset, width: entry.key_text_span(path, offset, width), sink)

    def refuse(self, code: str, message: str, node: ast.AST | None, help: str) -> Refused:
        """Reports a finding at `node` (or at the whole text); raise what it returns."""
        self.sink.error(code, message, self.span(node), help)
        return Refused(message)

    def span(self, node: ast.AST | None = None) -> Span:
        if node is None:
            return self.locate(0, max(1, len(self.value.split("\n")[0])))
        start, end = self.offsets(node)
        return self.locate(start, max(1, end - start))

    def offsets(self, node: ast.AST) -> tuple[int, int]:
        """The start and end of the node in characters; a node of several lines ends with its first line."""
        lines = self.value.split("\n")
        line, column = int(getattr(node, "lineno", 1)) - 1, int(getattr(node, "col_offset", 0))
        is_one_line = getattr(node, "end_lineno", 0) == line + 1
        end = int(getattr(node, "end_col_offset", column)) if is_one_line else len(lines[line])
        before = sum(len(text) + 1 for text in lines[:line])
        return before + column, before + end

    def part(self, start: int, end: int) -> "Text":
        """The characters from `start` to `end` as a located text."""
        return Text(self.value[start:end], lambda offset, width: self.locate(start + offset, width), self.sink)

    def trimmed_part(self, start: int, end: int) -> "Text":
        """The characters from `start` to `end` without surrounding spaces."""
        raw = self.value[start:end]
        if not raw.strip():
            return self.part(start, end)
        return self.part(start + len(raw) - len(raw.lstrip()), start + len(raw.rstrip()))


def parse_statements(text: Text) -> list[ast.stmt]:
    """The statements of a block; raises Refused when it does not parse."""
    tree = _parse(text, "exec")
    if not isinstance(tree, ast.Module) or not tree.body:
        raise text.refuse(
            "SAGE101", "expected a statement, got nothing", None, "write one `name = expression` per line"
        )
    return tree.body


def parse_expression(text: Text, forms: tuple[type[ast.AST], ...] = ()) -> ast.expr:
    """One expression; raises Refused when it does not parse or contains nodes outside the grammar and `forms`."""
    tree = _parse(text, "eval")
    assert isinstance(tree, ast.Expression), "mode eval returns an Expression"
    check_grammar(text, tree.body, forms)
    return tree.body


def _parse(text: Text, mode: Literal["exec", "eval"]) -> ast.AST:
    _check_characters(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.value, mode=mode)
    except SyntaxError as error:
        raise _syntax_error(text, error) from None
    except (ValueError, RecursionError, MemoryError):
        raise text.refuse(
            "SAGE103", "the expression is nested too deeply", None, "split it into several lines"
        ) from None


def _check_characters(text: Text) -> None:
    if len(text.value) > MAX_LENGTH:
        message = f"a text must have at most {MAX_LENGTH} characters, got {len(text.value)}"
        raise text.refuse("SAGE103", message, None, "split it into several lines or ops")
    depth = 0
    for offset, character in enumerate(text.value):
        if not (character == "\n" or " " <= character <= "~"):
            help = "write ASCII: - for a dash, * for a product, ' for quotes"
            text.sink.error("SAGE101", "an expression must be printable ASCII", text.locate(offset, 1), help)
            raise Refused
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            message = f"brackets must be nested at most {MAX_DEPTH} levels deep"
            text.sink.error("SAGE103", message, text.locate(offset, 1), "split it into several lines")
            raise Refused


def _syntax_error(text: Text, error: SyntaxError) -> Refused:
    lines = text.value.split("\n")
    line = min(max(error.lineno or 1, 1), len(lines))
    column = min(max(error.offset or 1, 1), len(lines[line - 1]) + 1)
    offset = sum(len(before) + 1 for before in lines[: line - 1]) + column - 1
    help = (
        "write `name = expression`" if "=" in text.value else "write names, numbers, operators and calls: a * (b + 1)"
    )
    text.sink.error("SAGE101", "the expression does not parse", text.locate(offset, 1), help)
    return Refused("syntax")


def check_grammar(text: Text, root: ast.AST, forms: tuple[type[ast.AST], ...] = ()) -> None:
    """Refuses nodes outside the grammar and `forms`, and trees and numbers that are too large."""
    inner: set[int] = set()
    for node, depth in _walk(root):
        if depth > MAX_DEPTH:
            message = f"an expression must be nested at most {MAX_DEPTH} levels deep"
            raise text.refuse("SAGE103", message, root, "split it into several lines")
        if not isinstance(node, (*_ALLOWED, *forms)):
            words = _REFUSED_WORDS.get(type(node), f"`{type(node).__name__}` is not supported")
            help = _REMEDIES.get(type(node), "use names, numbers, arithmetic, comparisons and calls of functions")
            raise text.refuse("SAGE102", words, node, help)
        if isinstance(node, ast.Constant):
            _check_constant(text, node)
        if isinstance(node, ast.BinOp | ast.Call):
            if id(node) not in inner:  # the outermost one is evaluated with its parts
                _check_constant_parts(text, node)
            inner |= set(map(id, ast.iter_child_nodes(node)))
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            check_grammar(text, node.func)
            raise text.refuse("SAGE102", "only named functions may be called", node.func, "write name(arguments)")


def _check_constant_parts(text: Text, node: ast.expr) -> None:
    """Refuses the innermost constant part without a usable value, such as `1.0 / 0.0` and `log(-1.0)`."""
    try:
        constant(node)
    except OutOfRange as error:
        shown = ast.unparse(error.node)
        help = "write a constant that can be computed"
        raise text.refuse("SAGE103", f"`{shown}`: {error}", error.node, help) from None


def _walk(root: ast.AST) -> Iterator[tuple[ast.AST, int]]:
    """All nodes with their depth, outermost first. Iterative, so that no tree can exhaust Python's stack."""
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        yield node, depth
        stack += [(child, depth + 1) for child in reversed(list(ast.iter_child_nodes(node)))]


def _check_constant(text: Text, node: ast.Constant) -> None:
    value = node.value
    if isinstance(value, complex | bytes | None | type(...)):
        help = "use a number, `true` or `false`"
        raise text.refuse("SAGE102", "a constant must be a number, `true` or `false`", node, help)
    if isinstance(value, float) and not math.isfinite(value):
        raise text.refuse("SAGE103", "a number must fit a 64-bit float", node, "use a number of at most 1.7e308")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise text.refuse("SAGE103", "an integer must be at most 2**53", node, "write it as a float: 1.0e16")
