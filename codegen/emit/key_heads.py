"""Key heads under tensor parallelism with more ranks than key heads: each rank has a copy of one head."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.layout import ConfigName, ModelDef, WeightDef


@dataclass(frozen=True, slots=True)
class KeyHeads:
    """The config name of the number of key heads, and the sizes of all rows of keys, or of values: Nkv, Nkv*D."""

    name: str
    sizes: frozenset[Size]

    def count(self, segment: Size) -> str | None:
        """The number of key heads in a segment of a weight, as a config name; None for rows of anything else."""
        return self.name if segment in self.sizes else None


def key_heads_of(model: ModelDef) -> KeyHeads | None:
    """The key heads of a layout that a rank can copy; None if no division of heads, or a sum over them, allows that."""
    (heads, width), (value_heads, value_width) = model.cache.k, model.cache.v
    name = next((one for one in model.divides if Size.symbol(one) == heads), None)
    if name is None or value_heads != heads or model.cache.is_shared:
        return None
    sizes = frozenset((heads, heads * width, heads * value_width))
    weights = [*model.weights, *(weight for block in model.blocks.values() for weight in block.weights)]
    is_summed = any(sizes & _summed(weight) for weight in weights)
    return None if is_summed else KeyHeads(name, sizes)


def derived_sizes(model: ModelDef, name: str) -> Iterator[ConfigName]:
    """The computed sizes of the config that depend on a name, such as the number of query heads per key head."""
    for one in model.config.values():
        is_computed = one.type == "size" and not one.keys and one.default is not None and one.name not in model.divides
        if is_computed and name in _names_in(one.default or ""):
            yield one


def _names_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}


def _summed(weight: WeightDef) -> set[Size]:
    """The divided sizes of a weight that a product contracts: their copies would be added."""
    shard = weight.shard
    if shard is None or shard.then is None:
        return set()
    return {weight.dims[shard.dim], *shard.segments}
