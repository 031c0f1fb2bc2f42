"""Links what a program returns: logits and tokens, or rows that are embeddings; their types tell which is which."""

from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.blocks import attends
from sageLLM.codegen.link.flatten import FlatModel, Placed
from sageLLM.codegen.link.scope import Value
from sageLLM.codegen.link.statements import BodyLinker
from sageLLM.codegen.model.layout import Results

_TOKENS, _SEQUENCES, _WANTED = Size.symbol("T"), Size.symbol("B"), Size.symbol("S")
_FORMS = "return E[T, ...], a row per token, or E[B, ...], a row per sequence"


@dataclass(frozen=True, slots=True)
class ResultLinker:
    """Finds the roles of one program's results. `body` has linked all its statements."""

    flat: FlatModel
    body: BodyLinker
    sink: Sink

    def link(self) -> Results:
        returned = {place.value: value for place in self.flat.returns if (value := self._value(place))}
        tokens = [name for name, value in returned.items() if _is_row_per(_TOKENS, value)]
        sequences = [name for name, value in returned.items() if _is_row_per(_SEQUENCES, value)]
        if tokens or sequences or not any(attends(block) for block in self.flat.blocks.values()):
            self._check_embeds(returned, {*tokens, *sequences})
        marked = self._marked(returned) if self.flat.hidden else None
        return Results(marked or next(iter(tokens), None), next(iter(sequences), None))

    def _value(self, place: Placed[str]) -> Value | None:
        value = self.body.values.get(place.value)
        if value is not None and place.value in self.body.assigned:
            return value
        near = did_you_mean(place.value, self.body.assigned)
        self.sink.error("SAGE228", f"'{place.value}' is no result of a statement", place.span(), near)
        return None

    def _check_embeds(self, returned: dict[str, Value], rows: set[str]) -> None:
        """A layout that returns rows returns nothing else; one without `attend` cannot return anything else."""
        for place in self.flat.returns:
            value = returned.get(place.value)
            if value is not None and value.type is not None and place.value not in rows:
                reason = "beside embeddings" if rows else "but no block attends, so nothing can be generated"
                message = f"the layout returns '{place.value}', which is {value.type}, {reason}"
                self.sink.error("SAGE228", message, place.span(), _FORMS)

    def _marked(self, returned: dict[str, Value]) -> str | None:
        """The value that `hidden` names: rows made by one statement of the program, which its name then stands for."""
        place = self.flat.hidden
        assert place is not None, "asked of layouts with `hidden`"
        value = self._value(place)
        if value is None or value.type is None:
            return None
        if not (_is_row_per(_WANTED, value) or _is_row_per(_TOKENS, value)):
            message = f"`hidden` is '{place.value}', which is {value.type}"
            self.sink.error("SAGE228", message, place.span(), "name rows of the width of the model: E[S, H]")
        elif self.body.assigned.count(place.value) > 1 and place.value not in returned:
            message = f"'{place.value}' is given {self.body.assigned.count(place.value)} times"
            self.sink.error("SAGE228", message, place.span(), "give the last one a name of its own")
        return place.value


def _is_row_per(what: Size, value: Value) -> bool:
    """Whether the value is a matrix of the model's element type with one row for each of them."""
    type_ = value.type
    return type_ is not None and type_.element == "E" and len(type_.dims) == 2 and type_.dims[0] == what
