"""What can be run: the package's generated ops, kernels, models and passes, and those of plugins.

A plugin is a folder that `sagellm generate --specs MY_SPECS --out FOLDER` made. It is imported from where it stands.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sageLLM.runtime.core.ir import OpNode
from sageLLM.runtime.core.layout import ModelLayout
from sageLLM.runtime.core.rewrite import OptimizationPass
from sageLLM.runtime.engine.trees import BASE, import_folder, read_table
from sageLLM.runtime.execution_graph.executor import Kernel


@dataclass(frozen=True, slots=True)
class Registry:
    """Everything generated, by name; a plugin's entry may not hide one of the package. `packages` are the trees."""

    ops: Mapping[str, type[OpNode]]
    kernels: Mapping[str, Kernel]
    models: Mapping[str, ModelLayout]
    passes: Mapping[str, type[OptimizationPass]]
    packages: tuple[str, ...] = ()

    def layout_of(self, architecture: str) -> ModelLayout | None:
        """The layout that reads checkpoints of this Hugging Face architecture."""
        return next((layout for layout in self.models.values() if architecture in layout.architectures), None)


def load_registry(plugins: Iterable[str | Path] = ()) -> Registry:
    """The package's own entries and the plugins'.

    Raises PluginError for a folder that was not generated or cannot be imported, and for a name that is taken.
    """
    return _registry([BASE, *(import_folder(Path(plugin)) for plugin in plugins)])


def load_tree(folder: Path) -> Registry:
    """The entries of a generated tree alone, which stands for the package's own, as when two of them are compared."""
    return _registry([import_folder(folder)])


def _registry(packages: list[str]) -> Registry:
    return Registry(
        ops=read_table(packages, "ops", "OPS"),
        kernels=read_table(packages, "kernels.reference", "KERNELS"),
        models=read_table(packages, "builders", "MODELS"),
        passes=read_table(packages, "passes", "PASSES"),
        packages=tuple(packages),
    )
