"""Views of a layout's statements, weights and inputs for templates/builder.py.jinja, as Python text."""

from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.emit.weights import WeightView
from sageLLM.codegen.model.layout import BlockCall, Phase


@dataclass(frozen=True, slots=True)
class InputView:
    """A step input, cache or table as `g.input(...)`."""

    name: str
    label: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CallView:
    """`targets = function(g, args, attrs)`, if `when` holds: Python text, or None for always."""

    targets: tuple[str, ...]
    function: str
    args: tuple[str, ...]
    attrs: tuple[tuple[str, str], ...]
    when: str | None = None


@dataclass(frozen=True, slots=True)
class BranchView:
    """The attention of some phases: the inputs that only it reads, and its call. The last branch is the `else`."""

    phases: tuple[Phase, ...]
    inputs: tuple[InputView, ...]
    call: CallView


@dataclass(frozen=True, slots=True)
class ChoiceView:
    """One branch of a `choose`; only the last one may omit the condition."""

    condition: str | None
    body: "BodyView"


@dataclass(frozen=True, slots=True)
class StepView:
    """One statement: a call, and those that follow it; `sharded` replaces `call` when tables are sharded over ranks."""

    call: CallView | None = None
    sharded: CallView | None = None
    reduce: tuple[CallView, ...] = ()
    then: tuple[CallView, ...] = ()
    branches: tuple[BranchView, ...] = ()
    choices: tuple[ChoiceView, ...] = ()
    block: BlockCall | None = None
    results: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BodyView:
    """Statements with the weights and inputs that they read and that are not declared outside."""

    weights: tuple[WeightView, ...]
    inputs: tuple[InputView, ...]
    steps: tuple[StepView, ...]

    def all_inputs(self) -> Iterator[InputView]:
        """The inputs that the body declares, including those of its branches."""
        yield from self.inputs
        for step in self.steps:
            yield from (one for branch in step.branches for one in branch.inputs)
            for choice in step.choices:
                yield from choice.body.all_inputs()

    @property
    def needs_rows(self) -> bool:
        """Whether an input has one row per token."""
        return any("T" in text.split() for one in self.all_inputs() for text in one.shape)
