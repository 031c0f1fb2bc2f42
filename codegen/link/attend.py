"""Links the `attend` form: the KV cache store of the new tokens, and the attention op of each phase."""

import ast
from collections.abc import Mapping

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.link.operands import from_decode, in_decode
from sageLLM.codegen.link.scope import Scope
from sageLLM.codegen.link.sharding import checked_states
from sageLLM.codegen.model.layout import PHASES, Attend, OpCall, Phase
from sageLLM.codegen.model.op import OpDef

_CACHES = ("k_cache", "v_cache")


def link_attend(scope: Scope, text: Text, targets: list[ast.Name], call: ast.Call) -> Attend:
    """The linked form; raises Refused after a finding."""
    if len(targets) != 1 or len(call.args) != 3:
        help = "pass optional operands and attrs of the attention op by keyword"
        raise text.refuse("SAGE222", "attend must have the form `o = attend(q, k, v)`", call, help)
    store_op = scope.context.ops.get("kv_store")
    if store_op is None or set(scope.context.attend) != set(PHASES):
        raise Refused  # reported with the phases
    if "slots" not in scope.context.inputs:
        message = "attend requires the step input 'slots', which specs/inputs.yaml does not declare"
        raise text.refuse("SAGE222", message, call, "declare it in specs/inputs.yaml")
    names = [scope.argument(text, node, store_op.inputs[0]) for node in call.args]
    store_args: list[str | None] = [names[1], names[2], *_CACHES, "slots"]
    store_types = scope.infer(text, store_op, store_args, {}, call, lambda type_: type_)
    store = OpCall(("kc", "vc"), store_op, tuple(store_args), (), store_types)
    checked_states(scope, text, store, call)
    by_phase: dict[Phase, OpCall] = {}
    # Phases may use different ops, so operands and attrs are checked against each of them.
    for phase in PHASES:
        op = scope.context.attend[phase]
        named = {operand.name: operand for operand in op.inputs if operand.optional}
        attrs = scope.attrs(text, call, op, named)
        passed = {k.arg: scope.argument(text, k.value, named[k.arg]) for k in call.keywords if k.arg in named}
        args = _attention_args(scope, text, op, {op.inputs[0].name: names[0], **passed}, call)
        types = scope.infer(text, op, args, dict(attrs), call, in_decode if phase == "decode" else lambda type_: type_)
        checked_states(scope, text, OpCall((targets[0].id,), op, tuple(args), tuple(attrs), types), call)
        # The attention op reads the caches that the store returns, so that it is ordered after the store.
        stored = {"k_cache": "kc", "v_cache": "vc"}
        renamed = tuple(stored.get(name, name) if name is not None else None for name in args)
        types = tuple(from_decode(type_) for type_ in types) if phase == "decode" else types
        by_phase[phase] = OpCall((targets[0].id,), op, renamed, tuple(attrs), types)
    scope.assign_all(text, targets, by_phase["prefill"].types, call, is_partial=False)
    return Attend(targets[0].id, store, by_phase)


def _attention_args(scope: Scope, text: Text, op: OpDef, passed: Mapping[str, str], call: ast.Call) -> list[str | None]:
    """The arguments that the statement passes, completed by the step inputs; optional operands are never filled in."""
    inputs = scope.context.inputs
    for operand in op.inputs:
        if operand.name not in {*passed, *inputs} and not operand.optional:
            message = f"{op.name} requires the input '{operand.name}', which specs/inputs.yaml does not declare"
            raise text.refuse("SAGE229", message, call, did_you_mean(operand.name, inputs))
    return [passed.get(operand.name, None if operand.optional else operand.name) for operand in op.inputs]
