"""What can be run: the package's generated ops, kernels, models and passes, and those of plugins.

A plugin is a folder that `sagellm generate --specs MY_SPECS --out FOLDER` made. It is imported from where it stands.
"""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sageLLM.runtime.core.ir import OpNode
from sageLLM.runtime.core.layout import ModelLayout
from sageLLM.runtime.core.rewrite import OptimizationPass
from sageLLM.runtime.engine.errors import PluginError
from sageLLM.runtime.execution_graph.executor import Kernel

BASE = "sageLLM.generated"


@dataclass(frozen=True, slots=True)
class Registry:
    """Everything generated, by name; a plugin's entry may not hide one of the package."""

    ops: Mapping[str, type[OpNode]]
    kernels: Mapping[str, Kernel]
    models: Mapping[str, ModelLayout]
    passes: Mapping[str, type[OptimizationPass]]

    def layout_of(self, architecture: str) -> ModelLayout | None:
        """The layout that reads checkpoints of this Hugging Face architecture."""
        return next((layout for layout in self.models.values() if architecture in layout.architectures), None)


def load_registry(plugins: Iterable[str | Path] = ()) -> Registry:
    """The package's own entries and the plugins'.

    Raises PluginError for a folder that was not generated or cannot be imported, and for a name that is taken.
    """
    return _registry([BASE, *(_import_folder(Path(plugin)) for plugin in plugins)])


def load_tree(folder: Path) -> Registry:
    """The entries of a generated tree alone, which stands for the package's own, as when two of them are compared."""
    return _registry([_import_folder(folder)])


def _registry(packages: list[str]) -> Registry:
    return Registry(
        ops=_merge(packages, "ops", "OPS"),
        kernels=_merge(packages, "kernels.reference", "KERNELS"),
        models=_merge(packages, "builders", "MODELS"),
        passes=_merge(packages, "passes", "PASSES"),
    )


def _merge(packages: Iterable[str], module: str, table: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for package in packages:
        entries = _entries(package, module, table)
        taken = sorted(merged.keys() & entries.keys())
        if taken:
            raise PluginError(
                f"plugin {_folder(package)}: {table} has {', '.join(taken)} already; rename in your specs"
            )
        merged |= entries
    return merged


def _entries(package: str, module: str, table: str) -> dict[str, Any]:
    try:
        entries: dict[str, Any] = getattr(import_module(f"{package}.{module}"), table)
    except Exception as error:  # a generated file that was edited or cut short may raise anything
        if package == BASE:
            raise
        folder = _folder(package)
        _forget(package)
        raise PluginError(_unusable(folder, error)) from error
    return entries


def _forget(package: str) -> None:
    """Takes a package and its modules out of Python's table, so that the next import reads the files anew."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _unusable(folder: str | Path, error: Exception) -> str:
    return f"plugin {folder} cannot be imported ({type(error).__name__}: {error}); generate it anew"


def _import_folder(folder: Path) -> str:
    """Imports a generated tree as a package of its own and returns the package's name."""
    start = folder / "__init__.py"
    if not start.is_file():
        raise PluginError(
            f"plugin {folder} is not a generated folder; make one with `sagellm generate --specs MY_SPECS --out FOLDER`"
        )
    name = f"sagellm_plugin_{sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, start, submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None, "a file location always has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            _forget(name)
            raise PluginError(_unusable(folder, error)) from error
    return name


def _folder(package: str) -> str:
    module: ModuleType = sys.modules[package]
    return str(Path(module.__file__ or package).parent)
