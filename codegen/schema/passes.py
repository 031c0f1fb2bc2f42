"""What a pass file may say: the stages of the pipeline, and passes of seven kinds with their rules and expectations."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sageLLM.codegen.schema.base import Strict

Kind = Literal["rewrite", "insert", "schedule", "place", "merge", "allocate", "python"]
PhaseName = Literal["prefill", "decode", "hybrid"]
ALL_OTHERS = "*"
"""In a list of models under `expect`: every model that no list names."""


def _model_names(names: Any) -> Any:
    if not isinstance(names, list) or not names:
        raise ValueError("expected a list of models after their count, such as `2*L: [llama, bert]`")
    return names


ModelNames = Annotated[list[str], BeforeValidator(_model_names)]


class RuleSpec(Strict):
    """One rewrite rule: derived from an op that `fuses` others, or written out as pattern and replacement."""

    from_op: str | None = Field(default=None, description="an op with `fuses`: its lines are the pattern")
    name: str | None = Field(default=None, description="how statistics and `explain` call a written-out rule")
    match: list[str] | None = Field(default=None, min_length=1, description="op calls; names stand for values")
    keep: list[str] = Field(default=[], description="values of the pattern that others may read as well")
    rewrite: list[str] | None = Field(default=None, min_length=1, description="op calls that give the kept values")
    where: list[str] = Field(
        default=[],
        description="conditions on values and attrs of the pattern: `bytes(p) <= 512 * 1024`, `dtype(x) == 'bf16'`",
    )
    bounded: int | None = Field(default=None, ge=1, description="the most that it fires in one graph")
    benefit: int = Field(default=1, ge=1, le=1000, description="rules with more benefit are tried first")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        written = (self.name, self.match, self.rewrite)
        if (self.from_op is None) == (written == (None, None, None)):
            raise ValueError("a rule has `from_op`, or `name`, `match`, `keep` and `rewrite`")
        if self.from_op is not None and (self.where or self.keep or self.bounded):
            raise ValueError("a derived rule has the conditions of its op: write `where` there")
        if self.from_op is None and None in written:
            raise ValueError("a written-out rule has `name`, `match`, `keep` and `rewrite`")
        return self


class ShareSpec(Strict):
    """What a stream takes of the device while other streams run."""

    part: float = Field(gt=0.0, lt=1.0, description="of the device's units; the others have the rest")
    speed: float = Field(gt=0.0, le=1.0, description="that its nodes reach with that part")


class PassSpec(Strict):
    """One pass. Which of the lower fields it has depends on its kind."""

    summary: str = Field(min_length=1)
    kind: Kind
    stage: str = Field(description="a stage of the pipeline, see `stages`")
    level: Literal["block", "kernel"] = Field(description="the graph that it works on")
    after: list[str] = Field(default=[], description="passes of the stage that run before this one")
    before: list[str] = Field(default=[], description="passes of the stage that run after this one")
    phases: list[PhaseName] = Field(default=["prefill", "decode", "hybrid"], min_length=1)
    rules: list[RuleSpec] = Field(default=[], description="rewrite: what to look for and what to put there")
    expect: dict[str, ModelNames] = Field(
        default={},
        description="rewrite: number of times that the rules fire, a formula over the config -> its models; "
        "`*` for all models that no list names",
    )
    select: str | None = Field(default=None, description="merge, insert: the op type that it works on")
    limit_bytes: int | None = Field(default=None, gt=0, description="merge: the largest merged transfer")
    streams: dict[str, list[str]] = Field(default={}, description="schedule: stream -> op types that run on it")
    shares: dict[str, ShareSpec] = Field(
        default={}, description="schedule: stream -> its share of the device, where streams slow down one another"
    )
    ahead: int | None = Field(default=None, gt=0, description="insert: how many layers ahead a load may start")
    budget_bytes: int | None = Field(default=None, gt=0, description="insert: the most that is loaded and not yet read")
    parts: int | None = Field(default=None, ge=1, le=16, description="place: micro-batches that the layers run for")
    move: dict[str, int] = Field(default={}, description="place: op type -> the device that its nodes run on")
    join: str | None = Field(default=None, description="merge, place: the op that puts rows after one another")
    split: str | None = Field(default=None, description="merge, place: the op that gives the first rows and the rest")
    send: str | None = Field(default=None, description="place: the op that gives a value to another device")
    recv: str | None = Field(default=None, description="place: the op that takes it there")
    function: str | None = Field(
        default=None,
        max_length=200,
        description="python: `package.module:name` of a function that changes a graph in place and counts its changes",
    )
    align: int | None = Field(default=None, gt=0, description="allocate: buffers start at multiples of this, in bytes")

    def group_of(self, model: str) -> tuple[str, int]:
        """The formula that counts for the model, and the index in its list; those of `*` if no list names the model."""
        for name in (model, ALL_OTHERS):
            for formula, models in self.expect.items():
                if name in models:
                    return formula, models.index(name)
        raise KeyError(model)

    @model_validator(mode="after")
    def _fields_of_kind(self) -> Self:
        wanted = FIELDS_OF_KIND[self.kind]
        for name in sorted({name for names in FIELDS_OF_KIND.values() for name in names}):
            given = name in self.model_fields_set
            if given and name not in wanted:
                raise ValueError(f"a pass of kind {self.kind} has no '{name}'")
            if not given and name in wanted and name not in OPTIONAL_FIELDS:
                raise ValueError(f"a pass of kind {self.kind} needs '{name}'")
        for names in FIELDS_TOGETHER:
            missing = [name for name in names if name not in self.model_fields_set and name in wanted]
            if missing and len(missing) < len(names):
                raise ValueError(f"{', '.join(names)} go together; '{missing[0]}' is missing")
        if unknown := sorted(self.shares.keys() - self.streams.keys()):
            raise ValueError(f"'{unknown[0]}' has a share, but is no stream of the pass")
        if sum(share.part for share in self.shares.values()) >= 1.0:
            raise ValueError("the shares leave nothing for the other streams")
        return self


FIELDS_OF_KIND: dict[str, tuple[str, ...]] = {
    "rewrite": ("rules", "expect"),
    "merge": ("select", "limit_bytes", "join", "split"),
    "schedule": ("streams", "shares"),
    "insert": ("select", "ahead", "budget_bytes"),
    "place": ("parts", "join", "split", "move", "send", "recv"),
    "allocate": ("align",),
    "python": ("function",),
}
OPTIONAL_FIELDS = ("expect", "shares", "join", "split", "move", "send", "recv")
FIELDS_TOGETHER = (("join", "split"), ("move", "send", "recv"))


class PassesFile(Strict):
    """`specs/passes/*.yaml`."""

    schema_: Literal["passes/v1"] = Field(alias="schema")
    stages: dict[str, str] = Field(default={}, description="the pipeline's stages in order, each with its purpose")
    passes: dict[str, PassSpec] = {}
