"""In which layers a weight exists: those whose way through the `choose` forms of a layout reads it."""

import ast
from collections.abc import Callable, Iterable

from sageLLM.codegen.emit.python_text import renamed
from sageLLM.codegen.link.config import INDEX
from sageLLM.codegen.model.layout import (
    Attend,
    BlockCall,
    Branch,
    Choose,
    Condition,
    ModelDef,
    OpCall,
    Repeat,
    Statement,
    WeightDef,
)

Presence = bool | str
"""Always, never, or a condition: Python text over `c` and the layer's number `i`."""


def layer_condition(model: ModelDef, weight: WeightDef) -> str | None:
    """The condition for the weight to exist in layer i, or None where it always does."""
    here = _in_program(model, lambda statement: _reads(statement, weight))
    if weight.block is not None:
        called = _in_program(model, lambda statement: _is_call(statement, weight.block))
        here = _both(called, _presence(model.blocks[weight.block].body, lambda s: _reads(s, weight)))
    texts = [here] if isinstance(here, str) else []
    texts += [text_of(weight.when)] if weight.when is not None else []
    return " and ".join(f"({text})" if len(texts) > 1 else text for text in texts) or None


def text_of(condition: Condition, index: str = INDEX) -> str:
    """The condition as Python, with the layer's number under another name."""
    return renamed(condition.python, condition.index, index) if condition.index else condition.python


def _in_program(model: ModelDef, reads: Callable[[OpCall | Attend | BlockCall], bool]) -> Presence:
    found: Presence = False
    for item in model.program:
        inner = _presence(item.body if isinstance(item, Repeat) else (item,), reads)
        found = _either(found, inner)
    return found


def _presence(body: Iterable[Statement], reads: Callable[[OpCall | Attend | BlockCall], bool]) -> Presence:
    found: Presence = False
    for statement in body:
        inner = _of_choose(statement.branches, reads) if isinstance(statement, Choose) else reads(statement)
        found = _either(found, inner)
    return found


def _of_choose(branches: Iterable[Branch], reads: Callable[[OpCall | Attend | BlockCall], bool]) -> Presence:
    """Any of the branches that are taken; a branch is reached where those before it are not."""
    found: Presence = False
    passed: Presence = True
    for branch in branches:
        inner = _presence(branch.body, reads)
        taken: Presence = text_of(branch.when) if branch.when is not None else True
        found = _either(found, _both(passed, _both(taken, inner)))
        if inner is not True:  # where it is read, "or" makes what follows independent of this branch
            passed = _both(passed, _negated(taken))
    return found


def _reads(statement: OpCall | Attend | BlockCall, weight: WeightDef) -> bool:
    if isinstance(statement, Attend):
        calls = (statement.store, *statement.by_phase.values())
        return any(weight.name in call.args for call in calls)
    return weight.name in statement.args


def _is_call(statement: OpCall | Attend | BlockCall, block: str | None) -> bool:
    return isinstance(statement, BlockCall) and statement.block == block


def _either(a: Presence, b: Presence) -> Presence:
    if isinstance(a, str) and isinstance(b, str):
        return a if a == b else f"({a}) or ({b})"
    return a or b if isinstance(a, bool) else (True if b is True else a)


def _both(a: Presence, b: Presence) -> Presence:
    if isinstance(a, str) and isinstance(b, str):
        return f"({a}) and ({b})"
    if a is False or b is False:
        return False
    return b if a is True else a


def _negated(condition: Presence) -> Presence:
    if isinstance(condition, bool):
        return not condition
    node = ast.parse(condition, mode="eval").body
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPPOSITES:
        node.ops = [_OPPOSITES[type(node.ops[0])]()]
        return ast.unparse(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ast.unparse(node.operand)
    return ast.unparse(ast.UnaryOp(ast.Not(), node))


_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
