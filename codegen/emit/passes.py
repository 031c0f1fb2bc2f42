"""Emits passes: a function per rewrite rule, a class per pass, and the table of all in pipeline order.

def fused_add_rms_norm(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
    if not isinstance(node, RmsNorm):
        return None
    add = graph.producer(node.x)
    if not isinstance(add, Add):
        return NearMiss(1, ...)
    ...
    return Rewrite(...)
"""

from collections.abc import Iterable
from pathlib import PurePosixPath

from sageLLM.codegen.contents import Row
from sageLLM.codegen.emit.pass_fields import ENGINES, OP_FIELDS, fields_of, function_of
from sageLLM.codegen.emit.rule_steps import RuleViewer
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.rule import PassDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header


def emit_passes(specs: Specs, renderer: Renderer) -> list[Output]:
    """`passes/fusion.py` for `specs/passes/fusion.yaml`, and `passes/__init__.py`."""
    own = [pass_ for pass_ in specs.passes.values() if not specs.raw.is_base(pass_.entry)]
    by_file: dict[str, list[PassDef]] = {}
    for pass_ in own:
        by_file.setdefault(pass_.entry.doc.file, []).append(pass_)
    outputs = [_module(file, passes, specs, renderer) for file, passes in by_file.items()]
    return [*outputs, _registry(own, specs, renderer)]


def _module(file: str, passes: list[PassDef], specs: Specs, renderer: Renderer) -> Output:
    rules = {pass_.name: [RuleViewer(rule).view() for rule in pass_.rules] for pass_ in passes}
    text = renderer.render(
        "passes.py.jinja",
        source=file,
        passes=passes,
        rules=rules,
        fields={pass_.name: fields_of(pass_, specs) for pass_ in passes},
        engines=ENGINES,
        function_modules=sorted({function_of(pass_)[0] for pass_ in passes if pass_.spec.function is not None}),
        op_imports=_op_imports(passes, specs),
    )
    entries = tuple(pass_.ref for pass_ in passes)
    rows = tuple(row for pass_ in passes for row in rule_rows(pass_))
    return Output(f"passes/{_stem(file)}.py", header(file, passes[0].name) + text, entries, rows)


def rule_rows(pass_: PassDef) -> list[Row]:
    """For each rule of a pass the ops that it rewrites, and those that it puts in their place."""
    return [
        {
            "rule": rule.name,
            "pass": pass_.name,
            "consumes": list(dict.fromkeys(call.op.name for call in rule.pattern)),
            "produces": list(dict.fromkeys(call.op.name for call in rule.replacement)),
        }
        for rule in pass_.rules
    ]


def _registry(passes: list[PassDef], specs: Specs, renderer: Renderer) -> Output:
    modules: dict[str, list[str]] = {}
    for pass_ in passes:
        modules.setdefault(_stem(pass_.entry.doc.file), []).append(pass_.class_name)
    text = renderer.render("passes_registry.py.jinja", passes=passes, modules=sorted(modules.items()))
    return Output("passes/__init__.py", header("specs/passes", "passes") + text)


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def _op_imports(passes: Iterable[PassDef], specs: Specs) -> list[tuple[str, list[str]]]:
    """The node classes that rules and fields name, by module."""
    modules: dict[str, set[str]] = {}
    for rule in (rule for pass_ in passes for rule in pass_.rules):
        for call in (*rule.pattern, *rule.replacement):
            modules.setdefault(op_module(call.op, specs), set()).add(call.op.class_name)
    for name in (name for pass_ in passes for field in OP_FIELDS if (name := getattr(pass_.spec, field)) is not None):
        modules.setdefault(op_module(specs.ops[name], specs), set()).add(specs.ops[name].class_name)
    return [(module, sorted(names)) for module, names in sorted(modules.items())]


def op_module(op: OpDef, specs: Specs) -> str:
    """The module of an op, as imported by a generated pass: relative, or absolute from an overlay into the package."""
    package = "sageLLM.generated.ops" if specs.is_overlay and specs.raw.is_base(op.entry) else "..ops"
    return f"{package}.{op.stem}"
