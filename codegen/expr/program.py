"""Checks a `compute` block: views, assignments, and that every output is assigned exactly once."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.expr.tree import Expr, Number, Program, Statement, View, names_read, root_of
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.expr.value_names import why_not_a_value_name
from sageLLM.codegen.expr.views import tiles


@dataclass(slots=True)
class ProgramChecker:
    """Checks the statements of one `compute` in order; a refused statement does not hide findings in the others."""

    text: Text
    scope: Scope
    inputs: Mapping[str, ValueType]
    outputs: Mapping[str, ValueType]
    views: Sequence[View]
    statements: list[Statement] = field(default_factory=list)
    written: dict[str, ast.AST] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)  # targets of refused statements: no findings about them
    sites: dict[str, ast.AST] = field(default_factory=dict)

    def check(self) -> Program | None:
        before = len(self.text.sink.diagnostics)
        try:
            body = parse_statements(self.text)
        except Refused:
            return None
        for statement in body:
            self._statement(statement)
        if not self.unknown:
            self._check_outputs()
            self._check_uses()
        if len(self.text.sink.diagnostics) > before:
            return None
        return Program(tuple(self.views), tuple(self.statements))

    def _statement(self, node: ast.stmt) -> None:
        target = "?"
        try:
            check_grammar(self.text, node)
            name = self._target(node)
            target = name.id
            if isinstance(node, ast.Assign):
                self._assign(name, node.value)
        except Refused:
            self.unknown.add(target)

    def _target(self, node: ast.stmt) -> ast.Name:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            help = "assign every value to a name, one per line"
            raise self.text.refuse("SAGE102", "a line must have the form `name = expression`", node, help)
        return node.targets[0]

    def _assign(self, name: ast.Name, value: ast.expr) -> None:
        destination = self._destination(name)
        if self.unknown & {inner.id for inner in ast.walk(value) if isinstance(inner, ast.Name)}:
            self.unknown.add(name.id)  # the cause is reported already
            return
        result = Checker(self.text, self.scope).expression(value)
        self._check_value(name, value, result, destination)
        self.statements.append(Statement(name.id, result))
        self.scope.values[name.id] = destination or result.type
        self.sites[name.id] = name

    def _destination(self, name: ast.Name) -> ValueType | None:
        """The declared type of an output or of a view of one; None for a new name."""
        target = name.id
        view = next((view for view in self.views if view.name == target), None)
        if target in self.inputs or (view and root_of(self.views, target) in self.inputs):
            raise self.text.refuse("SAGE112", f"the input '{target}' must not be assigned", name, "choose a new name")
        if target in self.written:
            help = "every name is assigned once; choose a new name"
            raise self.text.refuse("SAGE111", f"'{target}' is already defined", name, help)
        self.written[target] = name
        if target in self.outputs:
            return self.outputs[target]
        if view:
            return view.type
        self._check_new_name(name)
        return None

    def _check_new_name(self, name: ast.Name) -> None:
        if why := why_not_a_value_name(name.id, self.scope):
            raise self.text.refuse("SAGE116", why, name, "choose another name")

    def _check_value(self, name: ast.Name, node: ast.expr, result: Expr, declared: ValueType | None) -> None:
        if declared is None:
            if result.type.is_literal:
                message = f"the value of '{name.id}' must be a tensor, got {result.type}"
                raise self.text.refuse("SAGE107", message, node, "write the expression where it is used")
            return
        if set(result.type.dims) != set(declared.dims) and not (isinstance(result, Number)):
            dims = f"[{', '.join(map(str, result.type.dims))}]"
            message = f"'{name.id}': expected {declared}, got the dims {dims}"
            help = "reduce the other dims, or change the type"
            raise self.text.refuse("SAGE109", message, node, help)
        if result.type.element != declared.element:
            message = f"'{name.id}': expected the element type {declared.element}, got {result.type.element}"
            raise self.text.refuse("SAGE109", message, node, f"cast the value: {declared.element}(...)")

    def _check_outputs(self) -> None:
        for name, type_ in self.outputs.items():
            if name not in self.written and not self._assigned_parts(name):
                message, help = f"the output '{name}' is never assigned", f"add `{name} = ...`"
                self.text.sink.error("SAGE110", message, self.text.span(), help)
            else:
                self._check_parts(name, type_, f"the output '{name}'")

    def _check_parts(self, name: str, type_: ValueType, words: str) -> None:
        """An output, or a view of one, must be assigned whole or by views that cover it exactly once."""
        parts = self._assigned_parts(name)
        if not parts:
            return
        site = self.text.span(self._first_assigned(parts[0]))
        if name in self.written:
            message = f"{words} must be assigned whole or by views, got both: '{parts[0].name}'"
            self.text.sink.error("SAGE111", message, site, "remove one of the assignments")
        elif not tiles(parts, type_):
            names = ", ".join(view.name for view in parts)
            message = f"the assigned views must cover {words} exactly once, got {names}"
            self.text.sink.error("SAGE110", message, site, "assign a view of each remaining part")
        for part in parts:
            self._check_parts(part.name, part.type, f"the view '{part.name}'")

    def _assigned_parts(self, name: str) -> list[View]:
        """The views of an operand or view that are assigned, whole or in parts."""
        own = [view for view in self.views if view.base == name]
        return [view for view in own if view.name in self.written or self._assigned_parts(view.name)]

    def _first_assigned(self, view: View) -> ast.AST:
        found = self.written.get(view.name)
        return found if found is not None else self._first_assigned(self._assigned_parts(view.name)[0])

    def _check_uses(self) -> None:
        used = {name for statement in self.statements for name in names_read(statement.value)}
        views = {view.name for view in self.views}
        for name, site in self.sites.items():
            if name not in used and name not in self.outputs and name not in views:
                self.text.sink.error("SAGE127", f"'{name}' is never used", self.text.span(site), "remove the line")


def with_view_types(scope: Scope, inputs: Mapping[str, ValueType], views: Sequence[View]) -> Scope:
    """The scope extended by the views of inputs; views of outputs are added when they are assigned."""
    of_inputs = {view.name: view.type for view in views if root_of(views, view.name) in inputs}
    return replace(scope, values=scope.values | of_inputs)
