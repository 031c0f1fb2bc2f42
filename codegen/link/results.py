"""Links the results of a program: logits and tokens, or rows of embeddings, told apart by their types."""

from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.blocks import attends
from sageLLM.codegen.link.flat_layout import FlatModel, Located
from sageLLM.codegen.link.scope import Value
from sageLLM.codegen.link.statements import BodyLinker
from sageLLM.codegen.model.layout import Results

_TOKENS, _SEQUENCES, _SAMPLED = Size.symbol("T"), Size.symbol("B"), Size.symbol("S")
_FORMS = "return E[T, ...], one row per token, or E[B, ...], one row per sequence"


@dataclass(frozen=True, slots=True)
class ResultLinker:
    """Determines the roles of one program's results, after `body` has linked all its statements."""

    flat: FlatModel
    body: BodyLinker
    sink: Sink

    def link(self) -> Results:
        returned = {located.value: value for located in self.flat.returns if (value := self._value(located))}
        tokens = [name for name, value in returned.items() if _is_row_per(_TOKENS, value)]
        sequences = [name for name, value in returned.items() if _is_row_per(_SEQUENCES, value)]
        if tokens or sequences or not any(attends(block) for block in self.flat.blocks.values()):
            self._check_embeds(returned, {*tokens, *sequences})
        marked = self._marked(returned) if self.flat.hidden else None
        return Results(marked or next(iter(tokens), None), next(iter(sequences), None))

    def _value(self, located: Located[str]) -> Value | None:
        value = self.body.values.get(located.value)
        if value is not None and located.value in self.body.assigned:
            return value
        near = did_you_mean(located.value, self.body.assigned)
        self.sink.error("SAGE228", f"expected the result of a statement, got '{located.value}'", located.span(), near)
        return None

    def _check_embeds(self, returned: dict[str, Value], rows: set[str]) -> None:
        """Reports results besides embeddings in a layout that returns embeddings, or that cannot generate text."""
        for located in self.flat.returns:
            value = returned.get(located.value)
            if value is not None and value.type is not None and located.value not in rows:
                kind = "that returns embeddings" if rows else "without `attend`"
                message = f"a layout {kind} must return embeddings only, got '{located.value}': {value.type}"
                self.sink.error("SAGE228", message, located.span(), _FORMS)

    def _marked(self, returned: dict[str, Value]) -> str | None:
        """The value that `hidden` names: rows that exactly one statement assigns, so that the name is unambiguous."""
        located = self.flat.hidden
        assert located is not None, "called for layouts with `hidden` only"
        value = self._value(located)
        if value is None or value.type is None:
            return None
        if not (_is_row_per(_SAMPLED, value) or _is_row_per(_TOKENS, value)):
            message = f"`hidden`: expected rows E[S, ...] or E[T, ...], got '{located.value}': {value.type}"
            self.sink.error("SAGE228", message, located.span(), "name the final hidden states: E[S, H]")
        elif self.body.assigned.count(located.value) > 1 and located.value not in returned:
            message = f"`hidden` must name a value that is assigned once, got '{located.value}', which is assigned"
            message += f" {self.body.assigned.count(located.value)} times"
            self.sink.error("SAGE228", message, located.span(), "use another name for the last assignment")
        return located.value


def _is_row_per(rows: Size, value: Value) -> bool:
    """Whether the value is a matrix of the model's element type with this number of rows."""
    type_ = value.type
    return type_ is not None and type_.element == "E" and len(type_.dims) == 2 and type_.dims[0] == rows
