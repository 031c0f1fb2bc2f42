"""Checks the fields of an op against its signature and semantics."""

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.link.signature import Signature
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.dim_sources import dim_sources
from sageLLM.codegen.schema.ops import KernelSpec, OpSpec


def check_op(entry: Entry[OpSpec], signature: Signature, semantics: str, sink: Sink) -> None:
    """Reports all findings; `semantics` is the field that defines the op: compute, fuses or reference."""
    _check_determined(entry, signature, semantics, sink)
    _check_inplace(entry, signature, sink)
    _check_fields(entry, semantics, sink)
    _check_sharding(entry, signature, sink)
    _check_cases(entry, signature, sink)
    if semantics == "reference":
        _check_epilogue_of(entry, signature, sink)


def _check_determined(entry: Entry[OpSpec], signature: Signature, semantics: str, sink: Sink) -> None:
    """Reports dims and element variables of operands that required inputs and attrs do not determine.

    A `reference` may treat the element type of an optional input by itself.
    """
    known = signature.dim_attrs | dim_sources(signature.inputs, signature.dim_attrs).keys()
    required = [o.type for o in signature.inputs if not o.optional]
    known |= {"R"} if any(LEADING in type_.dims for type_ in required) else set()
    elements = {type_.element for type_ in required}
    reported: set[str] = set()
    sections = (("inputs", "input", signature.inputs), ("outputs", "output", signature.outputs))
    for key, words, operand in ((key, words, operand) for key, words, group in sections for operand in group):
        names = dict.fromkeys(symbol for dim in operand.type.dims for symbol in dim.symbols if symbol not in known)
        is_free = semantics == "reference" and key == "inputs"
        if operand.type.element in signature.elements and operand.type.element not in elements and not is_free:
            names[operand.type.element] = None
        for name in (name for name in names if name not in reported):
            reported.add(name)
            message = f"{name} of the {words} '{operand.name}' must be determined by a required input"
            sink.error("SAGE132", message, entry.span(key, operand.name), _determined_help(name, signature))


def _determined_help(name: str, signature: Signature) -> str:
    if name == "R":
        return "add `...` to a required input"
    if name not in signature.dims:
        return f"use {name} in the type of a required input"
    return f"use {name} alone as a dim of a required input, or make it an attr: `{name}: {{type: dim}}`"


def _check_inplace(entry: Entry[OpSpec], signature: Signature, sink: Sink) -> None:
    for name, source in entry.spec.inplace.items():
        output, input_ = signature.output_types.get(name), signature.input_types.get(source)
        if output is None:
            help = did_you_mean(name, signature.output_types)
            sink.error("SAGE122", f"unknown output '{name}'", entry.key_span("inplace", name), help)
        elif input_ is None:
            help = did_you_mean(source, signature.input_types)
            sink.error("SAGE122", f"unknown input '{source}'", entry.span("inplace", name), help)
        elif output != input_:
            types = f"'{name}': {output} and '{source}': {input_}"
            message = f"an in-place output must have the type of its input, got {types}"
            sink.error("SAGE122", message, entry.span("inplace", name), "remove it, or name another input")


def _check_fields(entry: Entry[OpSpec], semantics: str, sink: Sink) -> None:
    """Reports fields that do not belong to an op of these semantics, and missing ones."""
    spec = entry.spec
    is_compute, is_fused, is_reference = (semantics == name for name in ("compute", "fuses", "reference"))
    remove, derived = "remove it", f"it is derived from `{semantics}`; remove it"
    add, op = "add it", f"an op with `{semantics}`"
    filled = "`kernel.params`, `hooks` and `epilogue_of` require `reference`"
    findings = [
        (bool(spec.views) and not is_compute, "views", "`views` requires `compute`", remove),
        (_is_filled(spec.kernel) and not is_reference, "kernel", filled, remove),
        (spec.kernel is not None and is_fused, "kernel", "`kernel` must not be set here", derived),
        (spec.rule is not None and not is_fused, "rule", "`rule` requires `fuses`", remove),
        (
            spec.op_type is None and not is_fused,
            "summary",
            f"{op} must have `op_type`",
            "add it, e.g. `op_type: ELEMENTWISE`",
        ),
        (spec.cost is not None and not is_reference, "cost", "`cost` must not be set here", derived),
        (spec.cost is None and is_reference, "reference", f"{op} must have `cost`", add),
        (spec.tp is not None and not is_reference, "tp", "`tp` must not be set here", derived),
    ]
    for is_wrong, key, message, remedy in findings:
        if is_wrong:
            sink.error("SAGE128", message, entry.key_span(key), remedy)


def _is_filled(kernel: KernelSpec | None) -> bool:
    return kernel is not None and bool(kernel.params or kernel.hooks or kernel.epilogue_of)


def _check_sharding(entry: Entry[OpSpec], signature: Signature, sink: Sink) -> None:
    """Reports names under `tp` that are not dims or inputs of the op."""
    spec = entry.spec.tp
    if spec is None:
        return
    dims = {symbol for type_ in signature.input_types.values() for dim in type_.dims for symbol in dim.symbols}
    groups = [(("linear_in", i), names, set(signature.input_types)) for i, names in enumerate(spec.linear_in)]
    for path, names, known in [(("divides",), spec.divides, dims), (("sums",), spec.sums, dims), *groups]:
        for j, name in enumerate(names):
            if name not in known:
                expected = "an input" if path[0] == "linear_in" else "a dim of the inputs"
                span = entry.span("tp", *path, j)
                sink.error("SAGE133", f"expected {expected}, got '{name}'", span, did_you_mean(name, known))


def _check_cases(entry: Entry[OpSpec], signature: Signature, sink: Sink) -> None:
    """Reports test cases that do not have one valid size for every dim."""
    required = _dims_of(signature)
    known = dict.fromkeys(
        [*required, *(symbol for o in signature.outputs for dim in o.type.dims for symbol in dim.symbols)]
    )
    for index, case in enumerate(entry.spec.tests.cases if entry.spec.tests else []):
        if missing := [name for name in required if name not in case]:
            message = f"the case must have a size for {', '.join(missing)}"
            help = f"a case has sizes for {', '.join(required)}"
            sink.error("SAGE126", message, entry.span("tests", "cases", index), help)
        for name, value in case.items():
            if name not in known or (isinstance(value, list) and name != "R"):
                is_known = name in known
                message = f"{name} must be one number" if is_known else f"expected a dim of the op, got '{name}'"
                help = "only R is a list" if is_known else did_you_mean(name, known) or "remove it"
                sink.error("SAGE126", message, entry.key_span("tests", "cases", index, name), help)
            elif not 1 <= min(value if isinstance(value, list) else [value], default=1) <= 2**20:
                message = f"a size must be 1 to 2**20, got {value}"
                sink.error("SAGE126", message, entry.span("tests", "cases", index, name), "choose a small size")


def _dims_of(signature: Signature) -> list[str]:
    """The dims of the operands and the dim attrs, in order; `R` represents `...`."""
    types = [operand.type for operand in signature.inputs]
    symbols = [symbol for type_ in types for dim in type_.dims for symbol in dim.symbols]
    return list(dict.fromkeys([*symbols, *(attr.name for attr in signature.attrs if attr.type == "dim")]))


def _check_epilogue_of(entry: Entry[OpSpec], signature: Signature, sink: Sink) -> None:
    """Reports a `kernel.epilogue_of` that is not a required input."""
    name = entry.spec.kernel.epilogue_of if entry.spec.kernel else None
    known = [o.name for o in signature.inputs if not o.optional]
    if name is not None and name not in known:
        message = f"expected a required input, got {'the optional ' if name in signature.optional else ''}'{name}'"
        sink.error("SAGE134", message, entry.span("kernel", "epilogue_of"), did_you_mean(name, known))
