"""Derives the layers in which a weight exists: those with a path through the `choose` forms that reads it."""

import ast
from collections.abc import Callable, Iterable

from sageLLM.codegen.emit.python_text import renamed
from sageLLM.codegen.expr.config_text import INDEX
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

LayerCondition = bool | str
"""Always, never, or Python text over `c` and the layer index `i`."""


def layer_condition(model: ModelDef, weight: WeightDef) -> str | None:
    """The condition under which the weight exists in layer i, or None if it always does."""
    here = _in_program(model, lambda statement: _reads(statement, weight))
    if weight.block is not None:
        called = _in_program(model, lambda statement: _is_call(statement, weight.block))
        here = _both(called, _condition_of(model.blocks[weight.block].body, lambda s: _reads(s, weight)))
    texts = [here] if isinstance(here, str) else []
    texts += [text_of(weight.when)] if weight.when is not None else []
    return " and ".join(f"({text})" if len(texts) > 1 else text for text in texts) or None


def text_of(condition: Condition, index: str = INDEX) -> str:
    """The condition as Python, with `index` as the name of the layer index."""
    return renamed(condition.python, condition.index, index) if condition.index else condition.python


def _in_program(model: ModelDef, reads: Callable[[OpCall | Attend | BlockCall], bool]) -> LayerCondition:
    found: LayerCondition = False
    for item in model.program:
        inner = _condition_of(item.body if isinstance(item, Repeat) else (item,), reads)
        found = _either(found, inner)
    return found


def _condition_of(body: Iterable[Statement], reads: Callable[[OpCall | Attend | BlockCall], bool]) -> LayerCondition:
    found: LayerCondition = False
    for statement in body:
        inner = _of_choose(statement.branches, reads) if isinstance(statement, Choose) else reads(statement)
        found = _either(found, inner)
    return found


def _of_choose(branches: Iterable[Branch], reads: Callable[[OpCall | Attend | BlockCall], bool]) -> LayerCondition:
    """Whether a branch that reads the weight is taken; a branch is taken only if those before it are not."""
    found: LayerCondition = False
    passed: LayerCondition = True
    for branch in branches:
        inner = _condition_of(branch.body, reads)
        taken: LayerCondition = text_of(branch.when) if branch.when is not None else True
        found = _either(found, _both(passed, _both(taken, inner)))
        if inner is not True:  # after a branch that always reads, `or` makes the negated condition redundant
            passed = _both(passed, _negated(taken))
    return found


def _reads(statement: OpCall | Attend | BlockCall, weight: WeightDef) -> bool:
    if isinstance(statement, Attend):
        calls = (statement.store, *statement.by_phase.values())
        return any(weight.name in call.args for call in calls)
    return weight.name in statement.args


def _is_call(statement: OpCall | Attend | BlockCall, block: str | None) -> bool:
    return isinstance(statement, BlockCall) and statement.block == block


def _either(a: LayerCondition, b: LayerCondition) -> LayerCondition:
    if isinstance(a, str) and isinstance(b, str):
        return a if a == b else f"({a}) or ({b})"
    return a or b if isinstance(a, bool) else (True if b is True else a)


def _both(a: LayerCondition, b: LayerCondition) -> LayerCondition:
    if isinstance(a, str) and isinstance(b, str):
        return f"({a}) and ({b})"
    if a is False or b is False:
        return False
    return b if a is True else a


def _negated(condition: LayerCondition) -> LayerCondition:
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
