"""Links the expectations of a pass: the number of times its rules fire, as formulas over the configs of models."""

import ast

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.facts import reached
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.schema.passes import ALL_OTHERS, PassSpec

_ALLOWED = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Name, ast.Load, ast.Constant)


def link_expectations(entry: Entry[PassSpec], raw: RawSpecs, sink: Sink) -> dict[str, str]:
    """The count of each model as Python text over its config `c`; findings go to the sink."""
    groups = entry.spec.expect
    expected: dict[str, str] = {}
    for formula, models in groups.items():
        known = _known_models(formula, models, entry, raw, sink)
        try:
            text = _count_text(Text.of_key(formula, entry, ("expect", formula), sink), known, raw)
        except Refused:
            continue
        expected |= dict.fromkeys(known, text)
    return expected


def _known_models(formula: str, models: list[str], entry: Entry[PassSpec], raw: RawSpecs, sink: Sink) -> list[str]:
    """The models of a group, without those that are unknown or in an earlier group."""
    known: list[str] = []
    for i, model in enumerate(models):
        span = entry.span("expect", formula, i)
        first, index = entry.spec.group_of(model)
        if model != ALL_OTHERS and model not in raw.models:
            sink.error("SAGE316", f"unknown model '{model}'", span, did_you_mean(model, raw.models))
        elif (first, index) != (formula, i):
            related = (("first counted here", entry.span("expect", first, index)),)
            sink.error("SAGE322", f"'{model}' is counted twice", span, "keep it in one list", related)
        else:
            known.append(model)
    return known


def _count_text(text: Text, models: list[str], raw: RawSpecs) -> str:
    """`2*L - 1` as Python text over the config `c` of each of the models."""
    node = parse_expression(text)
    for inner in ast.walk(node):
        is_integer = not isinstance(inner, ast.Constant) or type(inner.value) is int
        if not isinstance(inner, _ALLOWED) or not is_integer:
            message = "a count must be made of config names, integers and + - * //"
            raise text.refuse("SAGE317", message, node, "write for example `2*L - 1`")
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.FloorDiv) and not _is_positive(inner.right):
            raise text.refuse(
                "SAGE317", "the divisor of `//` must be a number other than 0", node, "write for example `L // 2`"
            )
        if isinstance(inner, ast.Name):
            _check_config_name(inner, text, models, raw)
    return ast.unparse(_OfConfig().visit(node))


def _check_config_name(node: ast.Name, text: Text, models: list[str], raw: RawSpecs) -> None:
    for model in models:
        known = _config_names(model, raw)
        if node.id not in known:
            owner = "all models" if model == ALL_OTHERS else f"'{model}'"
            message = f"expected a config name of {owner}, got '{node.id}'"
            raise text.refuse("SAGE317", message, node, did_you_mean(node.id, known))


def _config_names(model: str, raw: RawSpecs) -> set[str]:
    """The config names of a model, or for `*` those that all models have."""
    if model == ALL_OTHERS:
        return set.intersection(*(_config_names(name, raw) for name in raw.models)) if raw.models else set()
    names: set[str] = set()
    for ancestor in reversed(reached([model], lambda name: _base_of(name, raw))):
        spec = raw.models[ancestor].spec
        names = names - {*(spec.drop.config if spec.drop else ())} | {*spec.config}
    return names


def _base_of(model: str, raw: RawSpecs) -> list[str]:
    extends = raw.models[model].spec.extends
    return [extends] if extends is not None and extends in raw.models else []


def _is_positive(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value > 0


class _OfConfig(ast.NodeTransformer):
    """Turns the name L into c.L."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Attribute(ast.Name("c", ast.Load()), node.id, ast.Load())
