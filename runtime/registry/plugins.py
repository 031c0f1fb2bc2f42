"""Registry of generated ops, kernels, models, passes, dialects and quantisation methods, also of plugins.

A plugin is a folder written by `sagellm generate --specs MY_SPECS --out FOLDER`; it is imported in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sageLLM.runtime.core.dialects.model import Dialect
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.model.formats import QuantMethod
from sageLLM.runtime.core.model.layout_table import LayoutTable
from sageLLM.runtime.core.passes.base import OptimizationPass
from sageLLM.runtime.errors import PluginError
from sageLLM.runtime.registry.trees import BASE, import_folder, layout_table, read_table


@dataclass(frozen=True)
class Registry:
    """All generated entries by name; passes in pipeline order. `packages` are the Python packages of the trees.

    A layout of the package is imported when it is first read.

    A plugin must not redefine an entry of the package: graphs name ops, so a plugin would silently change all models.
    """

    packages: tuple[str, ...]
    ops: Mapping[str, type[OpNode]]
    models: LayoutTable
    passes: Mapping[str, type[OptimizationPass]]
    methods: Mapping[str, QuantMethod]

    @cached_property
    def kernels(self) -> Mapping[str, Kernel]:
        """The reference kernels; torch is imported at the first access."""
        return read_table(self.packages, "kernels.reference", "KERNELS")

    @cached_property
    def format_values(self) -> Mapping[str, Mapping[str, Kernel]]:
        """The functions that compute weights from their stored tensors, by method and format; imports torch."""
        return read_table(self.packages, "formats.values", "VALUES")


def load_registry(plugins: Iterable[str | Path] = ()) -> Registry:
    """The entries of the package and the plugins.

    Raises PluginError for a folder that was not generated or cannot be imported, and for a duplicate name.
    """
    return _registry([BASE, *(import_folder(Path(plugin)) for plugin in plugins)])


def load_dialects(plugins: Iterable[str | Path] = ()) -> dict[str, Dialect]:
    """The dialects of the package and the plugins. Raises PluginError."""
    return read_table([BASE, *(import_folder(Path(plugin)) for plugin in plugins)], "dialects", "DIALECTS")


def load_tree(folder: Path) -> Registry:
    """The entries of a generated tree alone, instead of the package's own, e.g. to compare two trees."""
    return _registry([import_folder(folder)])


def _registry(packages: list[str]) -> Registry:
    return Registry(
        packages=tuple(packages),
        ops=read_table(packages, "ops", "OPS"),
        models=layout_table(packages),
        passes=_in_order(read_table(packages, "passes", "PASSES")),
        methods=read_table(packages, "formats", "METHODS"),
    )


def _in_order(passes: Mapping[str, type[OptimizationPass]]) -> dict[str, type[OptimizationPass]]:
    """Each pass after those that it names in `after` and those that name it in `before`, else in table order.

    A single tree is already in order; a plugin's passes may have to run among the package's. Raises PluginError if the
    order is cyclic.
    """
    order: dict[str, type[OptimizationPass]] = {}
    waiting = dict(passes)  # of several ready passes the first is taken, so that a plugin cannot reorder the package's
    while waiting:
        free = next((name for name in waiting if not _waits_for(name, waiting)), None)
        if free is None:
            raise PluginError(f"the order of the passes is cyclic: {', '.join(waiting)}")
        order[free] = waiting.pop(free)
    return order


def _waits_for(name: str, passes: Mapping[str, type[OptimizationPass]]) -> set[str]:
    return (set(passes[name].after) & passes.keys()) | {other for other, one in passes.items() if name in one.before}
