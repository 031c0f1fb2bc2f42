"""Explains a name: an op, model, pass, rule, device, dialect, deployment, error code, or a line of generated code.

`kernels` is the table of all ops with the targets that have a kernel for them.
"""

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sageLLM.codegen.codes import CODES
from sageLLM.codegen.diagnostics import Span, did_you_mean
from sageLLM.codegen.emit.builders import model_rows
from sageLLM.codegen.emit.dialects import dialect_section
from sageLLM.codegen.emit.docs import Uses, model_section, op_section
from sageLLM.codegen.emit.gaps import TARGETS, kernel_gaps, kernel_table, references, slow_fusions
from sageLLM.codegen.emit.passes import rule_rows
from sageLLM.codegen.kernel.cost import with_kernel_cost
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.rule import PassDef, RuleDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Renderer
from sageLLM.codegen.writer import read_manifest

if TYPE_CHECKING:
    from sageLLM.codegen.load import Entry
    from sageLLM.codegen.schema.deploy import DeployFile

_LINE = re.compile(r"(.+\.(?:py|md|cpp)):(\d+)")
_PROVENANCE = re.compile(r"(?:#|//)\s+(\S+\.yaml): (\w+)")


def explain(name: str, specs: Specs, out: Path) -> str:
    """The explanation as text. Raises LookupError with similar names for an unknown one."""
    if name in CODES:
        info = CODES[name]
        return f"{name}: {info.title}\n\n{info.explanation}"
    if place := _LINE.fullmatch(name):
        return _explain_line(Path(place[1]), int(place[2]), specs, out)
    for kind, table in (("op", specs.ops), ("model", specs.models)):
        if name in table:
            entry = table[name].entry
            text = f"{kind} {name}, {entry.key_span()}\n\n{_section(name, specs)}\n\n{_made_from(entry.ref, out)}"
            kernels = [_kernels(specs.ops[name], specs)] if kind == "op" else []
            return "\n\n".join([text, *kernels, *_rules_named(name, specs), *_dialects_named(name, specs, out)])
    if name == "kernels":
        return kernel_table([op for ops in specs.own().ops_by_stem.values() for op in ops], specs)
    if name in specs.passes:
        return _explain_pass(specs.passes[name], out)
    if rules := _rules_named(name, specs):
        return "\n\n".join(rules)
    if name in specs.hardware:
        entry_of_device = specs.hardware[name]
        return f"device {name}, {entry_of_device.key_span('hardware')}\n\n{entry_of_device.spec.summary}"
    if name in specs.raw.deploy:
        return _explain_deployment(specs.raw.deploy[name])
    if dialects := _dialects_named(name, specs, out):
        return "\n\n".join(dialects)
    if name in specs.methods:
        method = specs.methods[name]
        lines = [f"method {name}, {method.entry.key_span('method')}", method.spec.summary]
        return "\n\n".join([*lines, _made_from(method.entry.ref, out)])
    raise LookupError(_unknown(name, specs))


def _dialects_named(name: str, specs: Specs, out: Path) -> list[str]:
    """The dialect of the name, which can also be that of a model, else those with this alias."""
    entries = [dialect.entry for dialect in specs.dialects.values()]
    found = [one for one in entries if one.name == name] or [one for one in entries if name in one.spec.aliases]
    return [
        f"dialect {one.name}, {one.span('dialect')}\n\n{dialect_section(one.spec)}\n\n{_made_from(one.ref, out)}"
        for one in found
    ]


def _rules_named(name: str, specs: Specs) -> list[str]:
    return [_explain_rule(rule, one) for one in specs.passes.values() for rule in one.rules if rule.name == name]


def _unknown(name: str, specs: Specs) -> str:
    rules = [rule.name for one in specs.passes.values() for rule in one.rules]
    entries = [*specs.ops, *specs.models, *specs.passes, *specs.hardware, *specs.methods, *specs.raw.deploy]
    known = [*entries, *rules, *specs.dialects, *CODES]
    help = did_you_mean(name, known)
    return f"unknown name '{name}'" + (f"; {help}" if help else "; `sagellm graph MODEL` lists the ops of a model")


def _section(name: str, specs: Specs) -> str:
    """The docs section of an op or a model. Its uses include rules and models of the base, also with overlays."""
    if name in specs.models:
        return model_section(specs.models[name])
    rows = [row for one in specs.passes.values() for row in rule_rows(one)]
    rows += [row for model in specs.models.values() for row in model_rows(model)]
    return op_section(with_kernel_cost(specs.ops[name], Programs(specs.ops)), Uses.of(name, rows))


def _kernels(op: OpDef, specs: Specs) -> str:
    """The targets that have a kernel of the op, and the reasons of the others."""
    programs = Programs(specs.ops)
    gaps = kernel_gaps([op], specs, programs, Renderer(specs.raw.templates))
    without = {gap.target for gap in gaps}
    lines = [f"kernels: {', '.join(['reference', *(name for name in TARGETS if name not in without)])}"]
    lines += [f"no {TARGETS[gap.target]} kernel: {gap.reason}" for gap in gaps]
    lines += references(op, specs)
    return "\n".join([*lines, *(f"slow: {one.message}" for one in slow_fusions([op], specs, programs))])


def _made_from(ref: str, out: Path) -> str:
    """The files in the tree at `out` that come from the entry."""
    paths = [f"{out.name}/{path}" for path, file in read_manifest(out).items() if ref in file.get("entries", ())]
    return f"generated: {', '.join(paths) or 'nothing yet; run `sagellm generate`'}"


def _explain_deployment(entry: "Entry[DeployFile]") -> str:
    spec = entry.spec
    lines = [f"deployment {entry.name}, {entry.span('deploy')}", "", spec.summary, "", f"model: {spec.model}"]
    for name, role in spec.roles.items():
        hosts = f" on {role.nodes} hosts" if role.nodes > 1 else ""
        devices = (
            f"{role.tp * role.pp} {role.device} device{'s' * (role.tp * role.pp > 1)} (tp {role.tp}, pp {role.pp})"
        )
        lines.append(f"{name}: {role.count} worker{'s' * (role.count > 1)} of {devices}{hosts}")
    targets = "local, torchrun, kubernetes or ray"
    lines += ["", f"commands: sagellm deploy {entry.name} --target {targets}"]
    return "\n".join([*lines, f"forecast: sagellm simulate --deploy {entry.name} --trace FILE"])


def _explain_pass(one: PassDef, out: Path) -> str:
    spec = one.spec
    lines = [f"pass {one.name}, {one.entry.key_span()}", "", spec.summary, ""]
    lines.append(f"kind {spec.kind}, stage {spec.stage}, level {spec.level}, phases {', '.join(spec.phases)}")
    lines += [f"rule {rule.name}: {rule.algebra}" for rule in one.rules]
    lines += [f"expected to fire {count} times in {', '.join(models)}" for count, models in spec.expect.items()]
    return "\n".join([*lines, _made_from(one.ref, out)])


def _explain_rule(rule: RuleDef, one: PassDef) -> str:
    lines = [f"rule {rule.name} of pass {one.name}, {one.entry.span(*rule.path)}", ""]
    lines += [f"  {call}" for call in rule.pattern] + ["becomes"] + [f"  {line}" for line in rule.results]
    lines += ["", f"kept for other consumers: {', '.join(rule.keep) or 'nothing'}; benefit {rule.benefit}"]
    if rule.optional:
        lines.append(f"optional: {', '.join(sorted(rule.optional))}")
    lines += [f"only where {condition.text}" for condition in rule.where]
    for call in rule.replacement:
        operands = ", ".join(f"{operand.name}: {operand.type}" for operand in call.op.inputs)
        lines.append(f"only where {call.op.name} takes the operands: {operands}")
        lines += [f"only where {call.op.name} is defined: {condition.text}" for condition in call.op.where]
    if rule.bounded is not None:
        lines.append(f"at most {rule.bounded} times in a graph")
    counts = one.spec.expect.items()
    lines += [f"the rules of {one.name} fire {count} times in {', '.join(models)}" for count, models in counts]
    stem = PurePosixPath(one.entry.doc.file).stem
    lines += ["", f"code: generated/passes/{stem}.py, {rule.name}"]
    lines.append(f"test: generated/tests/test_rules_{stem}.py, test_{rule.name}")
    return "\n".join([*lines, f"no match? sagellm graph MODEL --why-not {rule.name} NODE"])


def _explain_line(path: Path, line: int, specs: Specs, out: Path) -> str:
    """The spec entry that a line of generated code comes from: the nearest `# file: name` above it."""
    candidates = [path, out / path, out.parent / path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise LookupError(f"file not found: {path}")
    above = found.read_text(encoding="utf-8").split("\n")[:line]
    if line < 1 or len(above) < line:
        raise LookupError(f"{path}: expected a line from 1 to {len(above)}, got {line}")
    for text in reversed(above):
        if origin := _PROVENANCE.fullmatch(text):
            return f"{path}:{line} comes from {_span_of(origin[1], origin[2], specs)} ({origin[2]})"
    return f"{path}:{line} comes from {_header_source(above[0])}"


def _span_of(file: str, name: str, specs: Specs) -> Span | str:
    raw = specs.raw
    for table in (raw.ops, raw.models, raw.passes, raw.hardware, raw.dialects, raw.formats):
        entry = table.get(name)
        if entry is not None and entry.doc.file == file:
            return entry.key_span()
    return file


def _header_source(first_line: str) -> str:
    found = re.search(r"generated by sagellm from (.+?)\. DO NOT EDIT", first_line)
    return found[1] if found else "no spec; the file is not generated"
