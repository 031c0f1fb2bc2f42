"""Links the form `attend`: the store of the new keys and values, and the attention op of each phase."""

import ast
from collections.abc import Mapping

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.link.operands import from_decode, in_decode
from sageLLM.codegen.link.scope import Scope
from sageLLM.codegen.link.sharding import checked_shares
from sageLLM.codegen.model.layout import PHASES, Attend, OpCall, Phase
from sageLLM.codegen.model.op import OpDef

_CACHES = ("k_cache", "v_cache")


def link_attend(scope: Scope, text: Text, targets: list[ast.Name], call: ast.Call) -> Attend:
    if len(targets) != 1 or len(call.args) != 3:
        help = "operands and attrs of the attention op may follow by name"
        raise text.refuse("SAGE222", "attend is `o = attend(q, k, v)`", call, help)
    store_op = scope.around.ops.get("kv_store")
    if store_op is None or set(scope.around.attend) != set(PHASES):
        raise Refused  # reported with the phases
    if "slots" not in scope.around.inputs:
        message = "attend reads 'slots', which specs/inputs.yaml does not declare"
        raise text.refuse("SAGE222", message, call, "declare it there")
    names = [scope.argument(text, node, store_op.inputs[0]) for node in call.args]
    store_args: list[str | None] = [names[1], names[2], *_CACHES, "slots"]
    store_types = scope.infer(text, store_op, store_args, {}, call, lambda type_: type_)
    store = OpCall(("kc", "vc"), store_op, tuple(store_args), (), store_types)
    checked_shares(scope, text, store, call)
    by_phase: dict[Phase, OpCall] = {}
    for phase in PHASES:
        op = scope.around.attend[phase]
        named = {operand.name: operand for operand in op.inputs if operand.optional}
        attrs = scope.attrs(text, call, op, named)
        given = {k.arg: scope.argument(text, k.value, named[k.arg]) for k in call.keywords if k.arg in named}
        args = _attention_args(scope, text, op, {op.inputs[0].name: names[0], **given}, call)
        types = scope.infer(text, op, args, dict(attrs), call, in_decode if phase == "decode" else lambda type_: type_)
        checked_shares(scope, text, OpCall((targets[0].id,), op, tuple(args), tuple(attrs), types), call)
        shown = {"k_cache": "kc", "v_cache": "vc"}
        renamed = tuple(shown.get(name, name) if name is not None else None for name in args)
        types = tuple(from_decode(type_) for type_ in types) if phase == "decode" else types
        by_phase[phase] = OpCall((targets[0].id,), op, renamed, tuple(attrs), types)
    scope.assign_all(text, targets, by_phase["prefill"].types, call, is_partial=False)
    return Attend(targets[0].id, store, by_phase)


def _attention_args(scope: Scope, text: Text, op: OpDef, given: Mapping[str, str], call: ast.Call) -> list[str | None]:
    """What the statement gives, and the step's inputs for the rest; an optional operand is given or absent."""
    inputs = scope.around.inputs
    for operand in op.inputs:
        if operand.name not in {*given, *inputs} and not operand.optional:
            message = f"the input '{operand.name}' of {op.name} is not among specs/inputs.yaml"
            raise text.refuse("SAGE229", message, call, did_you_mean(operand.name, inputs))
    return [given.get(operand.name, None if operand.optional else operand.name) for operand in op.inputs]
