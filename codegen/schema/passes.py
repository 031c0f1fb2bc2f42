"""Schema of pass files: the stages of the pipeline, and passes of seven kinds with their rules and expectations."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.schema.base import BrokenRule, Strict

Kind = Literal["rewrite", "insert", "schedule", "place", "merge", "allocate", "python"]
PhaseName = Literal["prefill", "decode", "hybrid"]
ALL_OTHERS = "*"
"""In a list of models under `expect`: every model that no list names."""


def _model_names(names: Any) -> Any:
    if not isinstance(names, list) or not names:
        raise BrokenRule(
            "expected a list of models after their count, such as `2*L: [llama, bert]`", "write the models in brackets"
        )
    return names


ModelNames = Annotated[list[str], BeforeValidator(_model_names)]


class RuleSpec(Strict):
    """One rewrite rule: derived from an op that `fuses` others, or written out as pattern and replacement."""

    from_op: str | None = Field(default=None, description="an op with `fuses`, which is then the pattern")
    name: str | None = Field(default=None, description="name of a written-out rule in statistics and `explain`")
    match: list[str] | None = Field(default=None, min_length=1, description="op calls; names bind values")
    keep: list[str] = Field(default=[], description="values of the pattern that other nodes may read as well")
    rewrite: list[str] | None = Field(default=None, min_length=1, description="op calls that produce the kept values")
    where: list[str] = Field(
        default=[],
        description="conditions on values and attrs of the pattern: `bytes(p) <= 512 * 1024`, `dtype(x) == 'bf16'`",
    )
    bounded: int | None = Field(default=None, ge=1, description="maximum number of times that it fires in one graph")
    benefit: int = Field(default=1, ge=1, le=1000, description="rules with a greater benefit are tried first")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        written = (self.name, self.match, self.rewrite)
        if (self.from_op is None) == (written == (None, None, None)):
            raise BrokenRule(
                "a rule must have either `from_op`, or `name`, `match`, `keep` and `rewrite`",
                "keep one of the two forms",
            )
        if self.from_op is not None and (self.where or self.keep or self.bounded):
            raise BrokenRule(
                "a rule with `from_op` must not have `where`, `keep` or `bounded`", "write `where` in the op"
            )
        if self.from_op is None and None in written:
            raise BrokenRule(
                "a rule without `from_op` must have `name`, `match`, `keep` and `rewrite`", "add the missing ones"
            )
        return self


class ShareSpec(Strict):
    """Share of the device that a stream uses while other streams run."""

    part: float = Field(gt=0.0, lt=1.0, description="fraction of the device's units; other streams use the rest")
    speed: float = Field(gt=0.0, le=1.0, description="relative speed of the stream's nodes with this fraction")


class PassSpec(Strict):
    """One pass. The fields from `rules` on depend on its kind."""

    summary: str = Field(min_length=1, description="one sentence: the change and its benefit")
    kind: Kind = Field(description="implementation of the pass, which determines its fields")
    stage: str = Field(description="stage of the pipeline, see `stages`")
    level: Literal["block", "kernel"] = Field(description="level of the graphs that it works on")
    after: list[str] = Field(default=[], description="passes of the stage that run before this one")
    before: list[str] = Field(default=[], description="passes of the stage that run after this one")
    phases: list[PhaseName] = Field(
        default=["prefill", "decode", "hybrid"], min_length=1, description="phases of the graphs that it works on"
    )
    kernels: list[Literal["reference", "cpu", "triton"]] = Field(
        default=[], description="run only for graphs that these kernels compute; by default for all graphs"
    )
    rules: list[RuleSpec] = Field(default=[], description="rewrite: patterns and replacements")
    expect: dict[str, ModelNames] = Field(
        default={},
        description="rewrite: number of rewrites, as a formula over the config -> the models with this number; "
        "`*` is all models that no list names",
    )
    select: str | None = Field(default=None, description="merge, insert: the op type that it works on")
    limit_bytes: int | None = Field(default=None, gt=0, description="merge: maximum size of a merged transfer")
    streams: dict[str, list[str]] = Field(default={}, description="schedule: stream -> op types that run on it")
    shares: dict[str, ShareSpec] = Field(
        default={}, description="schedule: stream -> its share of the device, if streams slow each other down"
    )
    prefetch_layers: int | None = Field(default=None, gt=0, description="insert: prefetch distance of loads in layers")
    budget_bytes: int | None = Field(default=None, gt=0, description="insert: maximum size of loaded, unread values")
    micro_batches: int | None = Field(default=None, ge=1, le=16, description="place: number of micro-batches")
    move: dict[str, int] = Field(default={}, description="place: op type -> the device that runs its nodes")
    join: str | None = Field(default=None, description="merge, place: the op that concatenates rows")
    split: str | None = Field(default=None, description="merge, place: the op that splits off the first rows")
    send: str | None = Field(default=None, description="place: the op that sends a value to another device")
    recv: str | None = Field(default=None, description="place: the op that receives it")
    function: str | None = Field(
        default=None,
        max_length=200,
        description="python: `package.module:name` of a function that edits a graph and returns the number of edits",
    )
    align: int | None = Field(default=None, gt=0, description="allocate: alignment of buffers in bytes")

    def group_of(self, model: str) -> tuple[str, int]:
        """The formula that counts for the model, and the index in its list; those of `*` if no list names the model."""
        for name in (model, ALL_OTHERS):
            for formula, models in self.expect.items():
                if name in models:
                    return formula, models.index(name)
        raise KeyError(model)

    @model_validator(mode="after")
    def _fields_of_kind(self) -> Self:
        allowed = FIELDS_OF_KIND[self.kind]
        for name in sorted({name for names in FIELDS_OF_KIND.values() for name in names}):
            is_set = name in self.model_fields_set
            if is_set and name not in allowed:
                raise BrokenRule(f"a pass of kind {self.kind} must not have `{name}`", "remove it, or change `kind`")
            if not is_set and name in allowed and name not in OPTIONAL_FIELDS:
                raise BrokenRule(f"a pass of kind {self.kind} must have `{name}`", f"add `{name}`")
        if self.kind == "rewrite" and not self.rules:
            raise BrokenRule("a pass of kind rewrite must have at least one rule", "write `rules: [{from_op: OP}]`")
        for names in FIELDS_TOGETHER:
            missing = [name for name in names if name not in self.model_fields_set and name in allowed]
            if missing and len(missing) < len(names):
                fields = ", ".join(f"`{name}`" for name in names)
                raise BrokenRule(f"{fields} must be set together, but `{missing[0]}` is missing", f"add `{missing[0]}`")
        if unknown := sorted(self.shares.keys() - self.streams.keys()):
            raise BrokenRule(
                f"`shares` must name streams of the pass, got '{unknown[0]}'", did_you_mean(unknown[0], self.streams)
            )
        if (total := sum(share.part for share in self.shares.values())) >= 1.0:
            raise BrokenRule(
                f"the parts of `shares` must add up to less than 1, got {total:g}", "leave a part for the other streams"
            )
        return self


FIELDS_OF_KIND: dict[str, tuple[str, ...]] = {
    "rewrite": ("rules", "expect"),
    "merge": ("select", "limit_bytes", "join", "split"),
    "schedule": ("streams", "shares"),
    "insert": ("select", "prefetch_layers", "budget_bytes"),
    "place": ("micro_batches", "join", "split", "move", "send", "recv"),
    "allocate": ("align",),
    "python": ("function",),
}
OPTIONAL_FIELDS = ("expect", "shares", "join", "split", "move", "send", "recv")
FIELDS_TOGETHER = (("join", "split"), ("move", "send", "recv"))


class PassesFile(Strict):
    """`specs/passes/*.yaml`."""

    schema_: Literal["passes/v1"] = Field(alias="schema", description="kind and version of the file")
    stages: dict[str, str] = Field(default={}, description="the pipeline's stages in order, each with its purpose")
    passes: dict[str, PassSpec] = Field(default={}, description="passes by name")

    @model_validator(mode="after")
    def _has_entries(self) -> "PassesFile":
        if not (self.stages or self.passes):
            raise BrokenRule("the file must have passes or stages", "add `passes: {NAME: ...}`, or remove the file")
        return self
