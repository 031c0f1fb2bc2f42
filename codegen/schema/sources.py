"""Schema of a weight's `hf`: the checkpoint tensors that it is built from, reversibly."""

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sageLLM.codegen.schema.base import BrokenRule, Strict

DimText = int | str


def shape_of(value: Any) -> str:
    """The union member that a YAML value selects: by its form, so that findings concern one member only."""
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, list) else "text"


Text = Annotated[str, Tag("text")]


class ConcatItem(Strict):
    """One of several concatenated sources, and its size along `dim`."""

    size: DimText = Field(description="size along `dim`")
    of: "Source" = Field(description="source of this part")


class StackSpec(Strict):
    """Equal sources stacked along a new first dim: `over: e in X`, `of: experts.{e}.w.weight`."""

    over: str = Field(description="`e in SIZE`: the index and the number of sources")
    of: "Source" = Field(description="source with `{e}` in its tensor names")


class HfSource(Strict):
    """Construction of a weight from checkpoint tensors, reversibly. Sources nest; a string is the name of a tensor."""

    concat: (
        Annotated[
            Annotated[dict[str, DimText], Tag("mapping")] | Annotated[list[ConcatItem], Tag("list")],
            Discriminator(shape_of),
        ]
        | None
    ) = Field(default=None, description="tensor name -> its size along `dim`, or a list of `{size: ..., of: SOURCE}`")
    dim: int = Field(default=0, ge=0, description="the dim along which `concat` concatenates")
    stack: StackSpec | None = Field(default=None, description="equal sources, stacked along a new first dim")
    transpose: "Source | None" = Field(default=None, description="the source, stored with its last two dims swapped")
    either: bool = Field(
        default=False,
        description="whether checkpoints may also have the tensor in the order of the weight; its shape decides",
    )
    rearrange: str | None = Field(
        default=None,
        description='reorders the axes of the tensor `of`: "(Nq c D) H -> (c Nq D) H", outermost axis first',
    )
    of: str | None = Field(default=None, description="the tensor that `rearrange` reads")
    sizes: dict[str, DimText] = Field(default={}, description="sizes of the axes that are not config names")
    take: dict[str, DimText] = Field(
        default={}, description="axis -> the range that is read: `start:stop`, or a single index, which drops the axis"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in ("concat", "stack", "transpose", "rearrange") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise BrokenRule(
                "a source must be a tensor name or one of `concat`, `stack`, `transpose`, `rearrange`",
                "keep one of them; sources nest by `of`",
            )
        if self.concat is not None and not self.concat:
            raise BrokenRule("`concat` must name at least one tensor", "write `concat: {NAME: SIZE, ...}`")
        for field, owner in (("dim", "concat"), ("of", "rearrange"), ("sizes", "rearrange"), ("take", "rearrange")):
            if field in self.model_fields_set and owner not in kinds:
                raise BrokenRule(f"`{field}` requires `{owner}`", f"add `{owner}`, or remove `{field}`")
        if self.rearrange is not None and self.of is None:
            raise BrokenRule("`rearrange` requires `of: TENSOR`, the name of a tensor", "add `of`")
        if self.either and not isinstance(self.transpose, str):
            raise BrokenRule("`either` requires `transpose: TENSOR`, the name of a tensor", "remove `either`")
        return self


# A discriminator, because pydantic would report the errors of all members of a plain union.
Source = Annotated[Text | Annotated[HfSource, Tag("mapping")], Discriminator(shape_of)]
for _schema in (ConcatItem, StackSpec, HfSource):
    _schema.model_rebuild()
