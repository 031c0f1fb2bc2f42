"""Emits the Triton kernels: `kernels/triton/norm.py` with kernels and launchers, and the table of all launchers."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sageLLM.codegen.contents import Contents, refs
from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors
from sageLLM.codegen.emit.dim_text import tidy
from sageLLM.codegen.emit.reference import parameters, parsed, result_type
from sageLLM.codegen.emit.triton_epilogue import EpilogueView, epilogue_view, template_of
from sageLLM.codegen.emit.triton_gemm import gemm_view
from sageLLM.codegen.emit.triton_launch import rows_view
from sageLLM.codegen.emit.triton_mask import MaskText
from sageLLM.codegen.emit.triton_text import TritonText
from sageLLM.codegen.expr.tree import Dot, Expr, IfPresent, Ref, names_read, walk
from sageLLM.codegen.kernel.epilogue import FusedEpilogue, fused_epilogue_of
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program, why_not_lowered
from sageLLM.codegen.kernel.mask import mask_bounds
from sageLLM.codegen.kernel.scatter import is_scattered
from sageLLM.codegen.model.op import Hook, OpDef, Reference, Template
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header

FOLDER = "kernels/triton"
BASE = "sageLLM.generated.kernels.triton"
REFERENCES = "sageLLM.generated.kernels.reference"
MOVES_NOTHING = ("VIEW", "CONCAT")
"""Op types that torch covers: views, which copy nothing, and a plain copy."""


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """One op's kernels and launcher."""

    op: OpDef
    text: str
    consumer: OpDef | None = None
    template: str = ""
    """The name of its template, by which targets choose its configuration."""
    callees: tuple[str, ...] = ()
    """The ops that the launcher calls by their launchers."""

    @property
    def coded(self) -> str:
        """The operand that may be codes, or empty."""
        found = re.search(r"\bstored\((\w+)\)", self.text)
        return "" if found is None else found[1]

    @property
    def references(self) -> list[OpDef]:
        """The ops that the launcher calls by their references."""
        candidates = [self.op, *([self.consumer] if self.consumer else [])]
        return [op for op in candidates if f"reference_{op.name}(" in self.text]


def emit_triton(ops: Sequence[OpDef], specs: Specs, renderer: Renderer, programs: Programs) -> list[Output]:
    """`kernels/triton/STEM.py` for one ops file, if one of its ops has a kernel for GPUs."""
    kernels = [kernel for op in ops if (kernel := _kernel(op, programs, renderer))]
    if not kernels:
        return []
    source = kernels[0].op.entry.doc.file
    text = renderer.render(
        "triton.py.jinja",
        kernels=kernels,
        base=BASE if specs.is_overlay else "",
        references=REFERENCES if specs.is_overlay else "..reference",
        imports=_imports(kernels, specs),
        source=source,
    )
    rows = tuple(
        {"name": one.op.name, "ref": one.op.ref, "template": one.template, "coded": one.coded} for one in kernels
    )
    return [Output(f"{FOLDER}/{ops[0].stem}.py", header(source, kernels[0].op.name) + text, refs(rows), rows)]


def emit_triton_support(specs: Specs, renderer: Renderer) -> list[Output]:
    """The helpers that kernels import; an overlay uses the package's."""
    if specs.is_overlay:
        return []
    texts = {
        name: renderer.render(f"triton_{name}.py.jinja") for name in ("device", "heads", "products", "routing", "tiles")
    }
    found = [Output(f"{FOLDER}/{name}.py", header("specs/ops", name) + text) for name, text in texts.items()]
    targets = specs.raw.targets
    text = renderer.render("triton_targets.py.jinja", targets=targets)
    entries = tuple(entry.ref for entry in targets.values())
    return [*found, Output(f"{FOLDER}/targets.py", header("specs/targets.yaml", "kernels") + text, entries)]


def emit_triton_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`kernels/triton/__init__.py` with KERNELS."""
    modules = contents.rows_by_stem(f"{FOLDER}/{{}}.py")
    text = renderer.render("triton_registry.py.jinja", modules=modules)
    entries = refs(row for rows in modules.values() for row in rows)
    return [Output(f"{FOLDER}/__init__.py", header("specs/ops", "rms_norm") + text, entries)]


def _imports(kernels: Sequence[TritonKernel], specs: Specs) -> list[str]:
    """Imports of the references that launchers call, as reference_NAME."""
    lines = []
    for op in dict.fromkeys(op.name for kernel in kernels for op in kernel.references):
        entry = specs.ops[op].entry
        package = REFERENCES if specs.is_overlay and specs.raw.is_base(entry) else "..reference"
        lines.append(f"from {package}.{specs.ops[op].stem} import {op} as reference_{op}")
    stem = kernels[0].op.stem
    for op in dict.fromkeys(op for kernel in kernels for op in kernel.callees):
        package = BASE if specs.is_overlay and specs.raw.is_base(specs.ops[op].entry) else "."
        if specs.ops[op].stem != stem or package == BASE:
            separator = "." if package == BASE else ""
            lines.append(f"from {package}{separator}{specs.ops[op].stem} import {op}")
    return lines


def _kernel(op: OpDef, programs: Programs, renderer: Renderer) -> TritonKernel | None:
    """The kernel from the op's template or from its equations; None if the reference is as good or the only choice."""
    if op.triton is not None:
        return TritonKernel(op, _template_text(op, op.triton, renderer), template=_stem(op.triton.name))
    fused = fused_epilogue_of(op, programs)
    if fused is not None:
        text = _fused_text(op, fused, programs, renderer)
        template = _fused_template(op, fused, programs, renderer)
        return TritonKernel(op, text, fused.consumer, _stem(template)) if text and template else None
    if op.fuses and (epilogue := epilogue_view(op, programs)) is not None:
        return TritonKernel(op, _epilogue_text(op, epilogue, programs, renderer), callees=epilogue.callees)
    program = None if op.op_type in MOVES_NOTHING else programs.of(op)
    if program is None or any(isinstance(one, Dot) for s in program.statements for one in walk(s.value)):
        return None
    try:
        rows = rows_view(op, row_program(op, programs), updates=is_scattered(op, programs.ops))
    except LoweringError:
        return None
    view = {"parameters": parameters(op), "result": result_type(op)}
    return TritonKernel(op, renderer.render("triton_rows.py.jinja", rows=rows, **view))


def _epilogue_text(op: OpDef, view: EpilogueView, programs: Programs, renderer: Renderer) -> str:
    constants = template_of(op, programs)
    assert constants is not None, "the GEMM of an epilogue has a template"
    text = {"parameters": parameters(op), "result": result_type(op), **dict(constants.params)}
    return renderer.render("triton_epilogue.py.jinja", op=op, view=view, **text)


def why_no_triton_kernel(op: OpDef, programs: Programs, renderer: Renderer) -> str | None:
    """The reason why an op has no Triton kernel, or None if it has one or needs none, as a view."""
    if op.triton is not None or op.op_type in MOVES_NOTHING:
        return None
    fused = fused_epilogue_of(op, programs)
    if fused is not None:
        return (
            None
            if _fused_template(op, fused, programs, renderer)
            else "its GEMM and its consumer require a common template"
        )
    if op.fuses and epilogue_view(op, programs) is not None:
        return None
    program = programs.of(op)
    if program is None:
        is_fused = "it fuses an op that is defined by a reference"
        return is_fused if op.fuses else "it is defined by a reference, without `kernel: {triton: ...}`"
    if any(isinstance(one, Dot) for s in program.statements for one in walk(s.value)):
        return "it contains a GEMM, which requires `kernel: {triton: ...}`" if not op.fuses else "it fuses a GEMM"
    return why_not_lowered(op, programs)


def _fused_template(op: OpDef, fused: FusedEpilogue, programs: Programs, renderer: Renderer) -> str | None:
    """The template of a GEMM with the consumer in it; None without one, or if the GEMM is not an op by itself."""
    assert fused.consumer.reference is not None, "a consumer has a reference"
    template = fused.consumer.reference.template.replace("reference/", "triton/gemm_")
    constants = programs.ops[op.fuses[0].op].triton
    if constants is None or op.attrs or len(fused.producer.fuses) > 1 or renderer.find(template) is None:
        return None
    return template


def _stem(template: str) -> str:
    """`triton/linear.py.jinja` -> `linear`."""
    return template.rpartition("/")[2].partition(".")[0]


def _template_text(op: OpDef, template: Template, renderer: Renderer) -> str:
    """The op's template, filled with its constants, its hooks, and the views of its hooks or equations."""
    view: dict[str, object] = {"op": op.name, "attrs": parameters(op).partition("*, ")[2], **dict(template.params)}
    view["passed"] = ", ".join(f"{attr.name}={attr.name}" for attr in op.attrs)
    hooks: tuple[Hook, ...] = ()
    if op.reference is not None:
        hooks = op.reference.hooks
        view |= _attention_view(op.reference)
    else:
        view |= {"summary": op.summary, "parameters": parameters(op), **gemm_view(op)}
    text = renderer.render(template.name, **view)
    check_kernel(op, text, [str(view[hook.name]) for hook in hooks])
    return text


def _fused_text(op: OpDef, fused: FusedEpilogue, programs: Programs, renderer: Renderer) -> str | None:
    """The GEMM's template with the consumer in it, filled; None without one."""
    template, constants = _fused_template(op, fused, programs, renderer), programs.ops[op.fuses[0].op].triton
    if template is None or constants is None:
        return None
    assert fused.consumer.reference is not None, "a consumer has a reference"
    roles = (*fused.consumer.inputs, *fused.consumer.outputs)
    operands = {role.name: o.name if o else "None" for role, o in zip(roles, fused.operands, strict=True)}
    view = gemm_view(replace(fused.producer, program=programs.of(fused.producer)))
    text = renderer.render(
        template,
        op=op.name,
        summary=op.summary,
        parameters=parameters(op),
        results=", ".join(o.name for o in op.outputs),
        **{fused.consumer.reference.template.removeprefix("reference/").partition(".")[0]: operands},
        **dict(constants.params),
        **view,
    )
    check_kernel(op, text, [])
    return text


def _attention_view(reference: Reference) -> dict[str, object]:
    """The hooks as text, the attrs that they use, and the range of keys that the mask lets a row see."""
    values = {hook.name: hook.value for hook in reference.hooks}
    view: dict[str, object] = {name: hook_text(value) for name, value in values.items()}
    tiles = {"score", "m", "n", "h"}
    names = dict.fromkeys(name for value in values.values() for name in sorted(names_read(value) - tiles))
    if "mask_mod" in values:
        keys = MaskText(mask_bounds(values["mask_mod"]))
        view |= {"first": keys.first, "stop": keys.stop, "unmasked": keys.unmasked}
    if "score_mod" in values:
        view |= {"names": list(names), "plain": plain_when(values["score_mod"])}
    return view


def hook_text(value: Expr) -> str:
    """A hook as Triton: its names are tiles of the template, with shapes that broadcast."""
    text = tidy(TritonText(_hook_leaf)(value))
    return text if text.isidentifier() else f"({text})"


def _hook_leaf(expr: Expr) -> str:
    assert isinstance(expr, Ref), f"the linker let a {type(expr).__name__} into a hook"
    return expr.name


def plain_when(score_mod: Expr) -> str:
    """The condition under which the hook returns the scores unchanged: `softcap is None`, or "" if never."""
    absent = []
    while isinstance(score_mod, IfPresent):
        absent.append(f"{score_mod.name} is None")
        score_mod = score_mod.b
    is_score = isinstance(score_mod, Ref) and score_mod.name == "score"
    return " and ".join(absent or ["True"]) if is_score else ""


def check_kernel(op: OpDef, text: str, hooks: Sequence[str]) -> None:
    """The contract of a template: it parses, takes the op's inputs, uses every hook, and stores every output once."""
    template = op.triton.name if op.triton is not None else "templates/triton"
    tree = parsed(text, template, op.entry.key_span("kernel", "triton"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    launcher = next((node for node in functions if node.name == op.name), None)
    inputs = [operand.name for operand in op.inputs]
    if launcher is None or [arg.arg for arg in launcher.args.args] != inputs:
        _refuse(op, f"the inputs of '{op.name}' must be those of the template, got {', '.join(inputs)}")
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for attr in op.attrs:
        if attr.name in stored:
            _refuse(op, f"the template has its own '{attr.name}', which the attr would shadow")
    for hook in hooks:
        if hook not in text:
            _refuse(op, f"the template must use the hook `{hook}`")
    for output in op.outputs:
        target = op.inplace.get(output.name, output.name)
        stores = [_stores(function, target) for function in functions if function is not launcher]
        if not any(stores) or max(stores) > 1:
            _refuse(op, f"the template must store '{output.name}' exactly once")


def _stores(function: ast.FunctionDef, target: str) -> int:
    """The number of stores to the operand in the text of a kernel."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store"]
    return sum(any(isinstance(n, ast.Name) and n.id == target for n in ast.walk(call.args[0])) for call in calls)


def _refuse(op: OpDef, message: str) -> None:
    help = "correct the op, or remove `kernel.triton`: a GPU then runs the reference"
    raise SpecErrors([Diagnostic("SAGE124", message, op.entry.key_span("kernel", "triton"), help)])
