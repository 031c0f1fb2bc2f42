"""What a weight's `hf` may say: which checkpoint tensors it is made of, and how, reversibly."""

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sageLLM.codegen.schema.base import Strict

DimText = int | str


def shape_of(value: Any) -> str:
    """Which member of a union a value of YAML is meant to be."""
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, list) else "text"


Text = Annotated[str, Tag("text")]


class ConcatItem(Strict):
    """One of several sources that are put together, and its size along `dim`."""

    size: DimText
    of: "Source"


class StackSpec(Strict):
    """Equal sources stacked along a new first dim: `over: e in X`, `of: experts.{e}.w.weight`."""

    over: str
    of: "Source"


class HfSource(Strict):
    """How a weight is made of checkpoint tensors, reversibly. Sources nest; a text is a tensor's name."""

    concat: (
        Annotated[
            Annotated[dict[str, DimText], Tag("mapping")] | Annotated[list[ConcatItem], Tag("list")],
            Discriminator(shape_of),
        ]
        | None
    ) = Field(default=None, description="tensor name -> its size along `dim`, or a list of `{size: ..., of: SOURCE}`")
    dim: int = Field(default=0, ge=0, description="the dim that `concat` puts its sources together on")
    stack: StackSpec | None = None
    transpose: "Source | None" = Field(default=None, description="the source has its last two dims swapped")
    rearrange: str | None = Field(
        default=None,
        description='the tensor `of`, taken apart and put together: "(Nq c D) H -> (c Nq D) H", outermost axis first',
    )
    of: str | None = Field(default=None, description="the tensor that `rearrange` reads")
    sizes: dict[str, DimText] = Field(default={}, description="sizes of the axes that are no config names")
    take: dict[str, DimText] = Field(
        default={}, description="axis -> the part of it that is read: `start:stop`, or one index, which drops the axis"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in ("concat", "stack", "transpose", "rearrange") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError("a source is one of `concat`, `stack`, `transpose`, `rearrange`, or just a tensor's name")
        if self.concat is not None and not self.concat:
            raise ValueError("`concat` names no tensor")
        for field, owner in (("dim", "concat"), ("of", "rearrange"), ("sizes", "rearrange"), ("take", "rearrange")):
            if field in self.model_fields_set and owner not in given:
                raise ValueError(f"`{field}` goes with `{owner}`")
        if self.rearrange is not None and self.of is None:
            raise ValueError("`rearrange` wants `of: TENSOR`, the tensor's name")
        return self


Source = Annotated[Text | Annotated[HfSource, Tag("mapping")], Discriminator(shape_of)]
for _schema in (ConcatItem, StackSpec, HfSource):
    _schema.model_rebuild()
