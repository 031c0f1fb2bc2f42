"""Parses spec expressions: Python's own parser, then a closed list of what may stand in the tree.

Nothing is ever evaluated. Length, depth and numbers are bounded before anything looks at the tree.
"""

import ast
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.load import Entry

MAX_LENGTH = 4000
MAX_DEPTH = 32
MAX_NUMBER = 2**53

_ALLOWED = (
    ast.Module, ast.Expression, ast.Expr, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Call,
    ast.keyword,
    ast.Tuple, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_REFUSED_WORDS = {
    ast.Attribute: "attributes are not part of the language",
    ast.Subscript: "subscripts are not part of the language",
    ast.Lambda: "functions cannot be defined here",
    ast.IfExp: "`if` is not part of the language",
    ast.Starred: "`*` before a name is not part of the language",
    ast.JoinedStr: "text is not part of the language",
}
_REMEDIES: dict[type[ast.AST], str] = {
    ast.Attribute: "call a named function, e.g. sum(v, H)",
    ast.Subscript: "name the part under `views`",
    ast.IfExp: "use where(condition, a, b), or optional(name, with, without)",
}


class Refused(Exception):
    """The finding is reported; give up the statement that it is in."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of spec text: what it says, where it stands, and where its findings go."""

    value: str
    locate: Callable[[int, int], Span]
    sink: Sink

    @classmethod
    def of(cls, value: str, entry: Entry[Any], path: tuple[str | int, ...], sink: Sink, start: int = 0) -> "Text":
        """`value` as it stands in the entry's text at `path`, `start` characters in."""
        return cls(value, lambda offset, width: entry.text_span(path, start + offset, width), sink)

    @classmethod
    def of_key(cls, value: str, entry: Entry[Any], path: tuple[str | int, ...], sink: Sink) -> "Text":
        """The key at the end of `path`."""
        return cls(value, lambda offset, width: entry.key_text_span(path, offset, width), sink)

    def refuse(self, code: str, message: str, node: ast.AST | None = None, help: str | None = None) -> Refused:
        """Reports a finding at `node` (or at the whole text); raise what it returns."""
        self.sink.error(code, message, self.span(node), help)
        return Refused(message)

    def span(self, node: ast.AST | None = None) -> Span:
        if node is None:
            return self.locate(0, max(1, len(self.value.split("\n")[0])))
        start, end = self.offsets(node)
        return self.locate(start, max(1, end - start))

    def offsets(self, node: ast.AST) -> tuple[int, int]:
        """Where the node begins and ends, in characters; a node of several lines ends with its first."""
        lines = self.value.split("\n")
        line, column = int(getattr(node, "lineno", 1)) - 1, int(getattr(node, "col_offset", 0))
        is_one_line = getattr(node, "end_lineno", 0) == line + 1
        end = int(getattr(node, "end_col_offset", column)) if is_one_line else len(lines[line])
        before = sum(len(text) + 1 for text in lines[:line])
        return before + column, before + end

    def part(self, start: int, end: int) -> "Text":
        """The characters from `start` to `end`, as a text of their own."""
        return Text(self.value[start:end], lambda offset, width: self.locate(start + offset, width), self.sink)


def parse_statements(text: Text) -> list[ast.stmt]:
    """The statements of a block; raises Refused when it does not parse."""
    tree = _parse(text, "exec")
    if not isinstance(tree, ast.Module) or not tree.body:
        raise text.refuse("SAGE101", "there is nothing here", None, "write one `name = expression` per line")
    return tree.body


def parse_expression(text: Text, forms: tuple[type[ast.AST], ...] = ()) -> ast.expr:
    """One expression; raises Refused when it does not parse or holds anything outside the grammar and `forms`."""
    tree = _parse(text, "eval")
    assert isinstance(tree, ast.Expression), "mode eval gives an Expression"
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
        raise text.refuse("SAGE103", "the expression is too deep", None, "split it over several lines") from None


def _check_characters(text: Text) -> None:
    if len(text.value) > MAX_LENGTH:
        raise text.refuse("SAGE103", f"the text has {len(text.value)} characters; {MAX_LENGTH} are allowed")
    depth = 0
    for offset, character in enumerate(text.value):
        if not (character == "\n" or " " <= character <= "~"):
            text.sink.error("SAGE101", "only plain ASCII characters may stand here", text.locate(offset, 1))
            raise Refused
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            message = f"brackets are nested deeper than {MAX_DEPTH} levels"
            text.sink.error("SAGE103", message, text.locate(offset, 1), "split it over several lines")
            raise Refused


def _syntax_error(text: Text, error: SyntaxError) -> Refused:
    lines = text.value.split("\n")
    line = min(max(error.lineno or 1, 1), len(lines))
    column = min(max(error.offset or 1, 1), len(lines[line - 1]) + 1)
    offset = sum(len(before) + 1 for before in lines[: line - 1]) + column - 1
    help = "write `name = expression`" if "=" in text.value else None
    text.sink.error("SAGE101", "the expression does not parse", text.locate(offset, 1), help)
    return Refused("syntax")


def check_grammar(text: Text, root: ast.AST, forms: tuple[type[ast.AST], ...] = ()) -> None:
    """Refuses what the language does not have beside `forms`, and trees and numbers that are too large."""
    for node, depth in _walk(root):
        if depth > MAX_DEPTH:
            raise text.refuse("SAGE103", f"the expression is deeper than {MAX_DEPTH} levels", root, "split it")
        if not isinstance(node, (*_ALLOWED, *forms)):
            words = _REFUSED_WORDS.get(type(node), f"`{type(node).__name__}` is not part of the language")
            raise text.refuse("SAGE102", words, node, _REMEDIES.get(type(node)))
        if isinstance(node, ast.Constant):
            _check_constant(text, node)
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            check_grammar(text, node.func)
            raise text.refuse("SAGE102", "only named functions can be called", node.func)


def _walk(root: ast.AST) -> Iterator[tuple[ast.AST, int]]:
    """All nodes with their depth, outermost first, without recursion."""
    stack = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        yield node, depth
        stack += [(child, depth + 1) for child in reversed(list(ast.iter_child_nodes(node)))]


def _check_constant(text: Text, node: ast.Constant) -> None:
    value = node.value
    if isinstance(value, complex | bytes | None | type(...)):
        raise text.refuse("SAGE102", "only numbers and `true` or `false` may stand here", node)
    if isinstance(value, float) and not math.isfinite(value):
        raise text.refuse("SAGE103", "the number does not fit a 64-bit float", node)
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise text.refuse("SAGE103", "an integer may be at most 2**53", node)
