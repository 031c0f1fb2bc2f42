"""Emits the torch references: `kernels/reference/norm.py` with one function per op, and the table of all."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sageLLM.codegen.contents import Contents
from sageLLM.codegen.diagnostics import Diagnostic, Span, SpecErrors
from sageLLM.codegen.emit.dim_text import dim_lines, leading_text, tidy
from sageLLM.codegen.emit.torch_layout import Layout, Piece, squeezed
from sageLLM.codegen.emit.torch_text import TorchText, view_text
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.expr.tree import Dot, Expr, IfPresent, Program, Ref, Statement, View, names_read
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.expr.views import grouped_parts, tile_axis
from sageLLM.codegen.model.op import Attr, AttrFormula, AttrName, AttrValue, Call, OpDef, Operand
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit

FOLDER = "kernels/reference"
BASE = "sageLLM.generated.kernels.reference"
ATTR_TYPES = {"f32": "float", "i32": "int", "bool": "bool", "str": "str", "dim": "int"}


@dataclass(frozen=True, slots=True)
class KernelView:
    """One function of the module: lines of generated code, or the text rendered from the op's template."""

    op: OpDef
    parameters: str
    result: str
    lines: tuple[str, ...]
    text: str | None


def emit_reference(ops: Sequence[OpDef], specs: Specs, renderer: Renderer) -> list[Output]:
    """`kernels/reference/STEM.py` for one ops file."""
    source, stem = ops[0].entry.doc.file, ops[0].stem
    text = renderer.render(
        "reference.py.jinja",
        kernels=[kernel_view(op, renderer) for op in ops],
        base=BASE if specs.is_overlay else "",
        imports=_imports(stem, ops, specs),
        source=source,
    )
    return [Output(f"{FOLDER}/{stem}.py", header(source, ops[0].name) + text, tuple(op.ref for op in ops))]


def emit_reference_support(specs: Specs, renderer: Renderer) -> list[Output]:
    """`kernels/__init__.py`, and the helpers that references import, which an overlay uses from the package."""
    about = header("specs/ops", "rms_norm") + '"""The kernels of the ops, by target."""\n'
    names = () if specs.is_overlay else ("kv_forms", "precision", "process_groups")
    texts = {name: header("specs/ops", name) + renderer.render(f"reference_{name}.py.jinja") for name in names}
    helpers = [Output(f"{FOLDER}/{name}.py", text) for name, text in texts.items()]
    return [Output("kernels/__init__.py", about), *helpers]


def emit_reference_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`kernels/reference/__init__.py` with KERNELS."""
    text = renderer.render("reference_registry.py.jinja", modules=contents.ops_by_stem)
    entries = tuple(op.ref for op in contents.ops)
    return [Output(f"{FOLDER}/__init__.py", header("specs/ops", "rms_norm") + text, entries)]


def _imports(stem: str, ops: Sequence[OpDef], specs: Specs) -> list[str]:
    """Imports of the functions that fused ops call."""
    called = [specs.ops[call.op] for op in ops for call in op.fuses]
    lines = []
    for op in dict.fromkeys(op.name for op in called if op.stem != stem):
        callee = specs.ops[op]
        module = f"{BASE}." if specs.raw.is_base(callee.entry) else "."
        lines.append(f"from {module}{callee.stem} import {op}")
    return lines


def kernel_view(op: OpDef, renderer: Renderer) -> KernelView:
    text = _template_text(op, renderer) if op.reference else None
    lines = _fused_lines(op) if op.fuses else KernelWriter(op, op.program).lines() if op.program else []
    return KernelView(op, parameters(op), result_type(op), tuple(lines), text)


def result_type(op: OpDef) -> str:
    return "Tensor" if len(op.outputs) == 1 else f"tuple[{', '.join(['Tensor'] * len(op.outputs))}]"


def parameters(op: OpDef) -> str:
    """`x: Tensor, w: Tensor, *, eps: float = 1e-06`."""
    inputs = [f"{o.name}: Tensor | None = None" if o.optional else f"{o.name}: Tensor" for o in op.inputs]
    attrs = [_parameter(attr) for attr in op.attrs]
    return ", ".join([*inputs, *(["*", *attrs] if attrs else [])])


def _parameter(attr: Attr) -> str:
    if attr.optional:
        return f"{attr.name}: {ATTR_TYPES[attr.type]} | None = None"
    default = f" = {lit(attr.default)}" if attr.default is not None else ""
    return f"{attr.name}: {ATTR_TYPES[attr.type]}{default}"


def _template_text(op: OpDef, renderer: Renderer) -> str:
    """The hand-written function with its hooks filled in."""
    assert op.reference is not None, "only ops with a reference have a template"
    hooks = {hook.name: hook_text(hook.value) for hook in op.reference.hooks}
    params = {name: lit(value) for name, value in op.reference.params}
    used = {name for hook in op.reference.hooks for name in names_read(hook.value)}
    attrs = ", ".join(_parameter(attr) for attr in op.attrs)
    context = {"op": op.name, "attrs": attrs, "used": used, "plain": plain_when(op)}
    text = renderer.render(op.reference.template, **context, **params, **hooks)
    _check_function(op, text, renderer.display(op.reference.template))
    return text


def parsed(text: str, template: str, span: Span) -> ast.Module:
    """The Python that a template produced. Raises SpecErrors with the wrong line."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = (getattr(error, "text", None) or "").strip()
        message = f"the function that {template} produces does not parse: {getattr(error, 'msg', error)}"
        raise SpecErrors(
            [Diagnostic("SAGE123", message, span, f"correct `{line}`" if line else "correct the template")]
        ) from None


def _check_function(op: OpDef, text: str, template: str) -> None:
    """Reports a rendered template that is not one function of the op's operands, or that assigns to its attrs."""
    span = op.entry.span("reference")
    tree = parsed(text, template, span)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == op.name]
    if len(tree.body) != 1 or not functions or len(functions[0].args.args) != len(op.inputs):
        message = f"the template must be a function of the {len(op.inputs)} inputs of '{op.name}'"
        taken = ", ".join(argument.arg for argument in functions[0].args.args) if functions else ""
        raise SpecErrors([Diagnostic("SAGE124", message, span, f"its inputs are: {taken}")])
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for attr in op.attrs:
        if attr.name in stored | {argument.arg for argument in functions[0].args.args}:
            message = f"the attr '{attr.name}' must not have the name of a variable of the template"
            raise SpecErrors([Diagnostic("SAGE124", message, op.entry.key_span("attrs", attr.name), "rename the attr")])


def hook_text(value: Expr) -> str:
    """A hook as torch; its names are tensors of the template, which have matching shapes."""
    layouts: dict[str, Layout] = dict.fromkeys(names_read(value), ())
    text = tidy(TorchText(layouts, {}, {}).piece(value).text)
    return text if text.isidentifier() else f"({text})"


def plain_when(op: OpDef) -> str:
    """The condition under which scores are plain products of queries and keys, as Python, or "" if there is none.

    For example `softcap is None and sinks is None`: torch's fused attention can then be used.
    """
    assert op.reference is not None, "called for ops with a reference only"
    absent = [operand.name for operand in op.inputs if operand.optional]
    value = next((hook.value for hook in op.reference.hooks if hook.name == "score_mod"), None)
    while isinstance(value, IfPresent):
        absent, value = [value.name, *absent], value.b
    is_plain = isinstance(value, Ref) and value.name == "score"
    return " and ".join(f"{name} is None" for name in absent) if is_plain else ""


def _fused_lines(op: OpDef) -> list[str]:
    lines = [_call_line(call) for call in op.fuses]
    outputs = tuple(o.name for o in op.outputs)
    if op.fuses[-1].targets == outputs:
        return [*lines[:-1], f"return {lines[-1].partition(' = ')[2]}"]
    return [*lines, f"return {', '.join(outputs)}"]


def _call_line(call: Call) -> str:
    arguments = [arg or "None" for arg in call.args]
    arguments += [f"{name}={attr_text(value)}" for name, value in call.kwargs]
    return f"{', '.join(call.targets)} = {call.op}({', '.join(arguments)})"


def attr_text(value: AttrValue) -> str:
    match value:
        case AttrName(name=name):
            return name
        case AttrFormula(text=text):
            return text
    return lit(value)


@dataclass(slots=True)
class KernelWriter:
    """Writes the body of the reference of one op with `compute`."""

    op: OpDef
    program: Program

    def lines(self) -> list[str]:
        """Sizes, views, statements and the return."""
        body = self._body()
        text, views = "\n".join(body), list[str]()
        for view in reversed(self.program.views):  # views of views come after those
            if self._is_input(self.program.root(view.name)) and _mentions(text, view.name):
                views.insert(0, f"{view.name} = {view_text(view)}")
                text += f"\n{view_text(view)}"
        wide = [f"f32 = wide({self._wide_operand()})"] if _mentions("\n".join([text, *views]), "f32") else []
        return [*self._sizes("\n".join([text, *views])), *wide, *views, *body]

    def _is_input(self, name: str) -> bool:
        return any(o.name == name for o in self.op.inputs)

    def _wide_operand(self) -> str:
        """The operand that selects the type of f32: for float64 operands it is float64."""
        found = [o.name for o in self.op.inputs if o.name in self.op.element_inputs.values()]
        found += [o.name for o in self.op.inputs if o.type.element == "f32" and not o.optional]
        return [*found, self.op.inputs[0].name][0]

    def _body(self) -> list[str]:
        layouts: dict[str, Layout] = {o.name: o.type.dims for o in self.op.inputs}
        layouts |= {v.name: v.type.dims for v in self.program.views}
        lets = {s.target: s.value for s in self.program.statements if isinstance(s.value, Dot)}
        writer = TorchText(layouts, self.op.element_inputs, lets)
        pieces: dict[str, Piece] = {}
        for statement in self.program.statements:
            piece = self._placed(statement, writer.piece(statement.value))
            pieces[statement.target] = piece
            writer.layouts[statement.target] = piece.layout
        return self._arranged(pieces)

    def _placed(self, statement: Statement, piece: Piece) -> Piece:
        """The value with the declared axes of an output or view; other values keep their axes."""
        output, view = self.op.operand(statement.target), self.program.view(statement.target)
        declared = output.type.dims if output else view.type.dims if view else None
        return squeezed(piece, declared) if declared is not None else piece

    def _arranged(self, pieces: dict[str, Piece]) -> list[str]:
        """Assignments of the values that are used, and the return; a single output is returned as an expression."""
        texts = {target: tidy(piece.text) for target, piece in pieces.items()}
        for statement in self.program.statements:
            self._inline_view(statement, texts)
        results = [self._result(output, texts) for output in self.op.outputs]
        used = "\n".join(results)
        lines: list[str] = []
        # From the last to the first: an assignment is kept if a later kept line uses it.
        for target, text in reversed(texts.items()):
            if _mentions(used, target):
                lines.insert(0, f"{target} = {text}")
                used += "\n" + text
        return [*lines, f"return {', '.join(results)}"]

    def _inline_view(self, statement: Statement, texts: dict[str, str]) -> None:
        """Replaces a statement's value by the text of a view, `q = qkv[...]`, if it is only the name of the view."""
        value = statement.value
        view = self.program.view(value.name) if isinstance(value, Ref) else None
        is_of_input = view is not None and self._is_input(self.program.root(view.name))
        if view is not None and is_of_input and texts[statement.target] == view.name:
            texts[statement.target] = view_text(view)

    def _result(self, output: Operand, texts: dict[str, str]) -> str:
        if output.name in texts:
            is_read = any(output.name in names_read(s.value) for s in self.program.statements)
            is_short = len(self.op.outputs) == 1 and not is_read
            return texts.pop(output.name) if is_short else output.name
        return self._assembled(output.name, output.type, texts)

    def _assembled(self, name: str, type_: ValueType, texts: dict[str, str]) -> str:
        """An output, or a view of one, from the views that it was assigned by."""
        parts = [view for view in self.program.views if view.base == name and self._is_assigned(view, texts)]
        axis = tile_axis(parts)
        if axis is None:
            dims = (f"*{leading_text(self.op)}" if dim == LEADING else str(dim) for dim in type_.dims)
            return f"{self._part_name(parts[0], texts)}.reshape({', '.join(dims) or '()'})"
        position = axis - len(type_.dims) if LEADING in type_.dims else axis
        names = [self._interleaved(group, texts, position) for group in grouped_parts(parts, axis)]
        return f"torch.cat(({', '.join(names)}), {position})" if len(names) > 1 else names[0]

    def _interleaved(self, group: Sequence[View], texts: dict[str, str], position: int) -> str:
        """A part of an output; parts with a step are interleaved component by component."""
        names = [self._part_name(part, texts) for part in group]
        if len(names) == 1:
            return names[0]
        new = position if position < 0 else position + 1
        return f"torch.stack(({', '.join(names)}), {new}).flatten({new - 1}, {new})"

    def _is_assigned(self, view: View, texts: dict[str, str]) -> bool:
        return view.name in texts or any(
            part.base == view.name and self._is_assigned(part, texts) for part in self.program.views
        )

    def _part_name(self, part: View, texts: dict[str, str]) -> str:
        """The name of a part, or of the operand if the part is an unchanged operand."""
        if part.name not in texts:
            return self._assembled(part.name, part.type, texts)
        return texts.pop(part.name) if self._is_input(texts[part.name]) else part.name

    def _sizes(self, text: str) -> list[str]:
        """`T = x.shape[0]`, `I = gu.shape[-1] // 2` for the dims that the text uses."""
        return dim_lines(self.op, [symbol for symbol in self.op.symbols if _mentions(text, symbol)])


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![.\w]){re.escape(name)}\b(?!\s*=[^=])", text) is not None
