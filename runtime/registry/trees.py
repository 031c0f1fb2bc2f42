"""Import of generated trees: the package's own, and the folders of plugins in place."""

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from hashlib import sha256
from importlib import import_module
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import Any

from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.model.layout_table import LayoutTable
from sageLLM.runtime.errors import PluginError

BASE = "sageLLM.generated"
NATIVE = "kernels.cpu"
TRITON = "kernels.triton"


def read_table(packages: Iterable[str], module: str, table: str) -> dict[str, Any]:
    """The entries of a table in all packages, by name; PluginError for a duplicate name."""
    return {name: entry for entries in _tables(packages, module, table) for name, entry in entries.items()}


def layout_table(packages: Iterable[str]) -> LayoutTable:
    """The layouts of all packages; PluginError for a duplicate name.

    Those of the package itself are imported when they are first read, and those of plugins here, where an error names
    the plugin.
    """
    tables: Iterator[LayoutTable] = _tables(packages, "builders", "MODELS")
    return reduce(or_, tables)


def _tables(packages: Iterable[str], module: str, table: str) -> Iterator[Any]:
    """The table of each package."""
    names: set[str] = set()
    for package in packages:
        entries = _entries(package, module, table)
        taken = sorted(names & entries.keys())
        if taken:
            raise PluginError(
                f"plugin {_folder(package)}: {table} already contains {', '.join(taken)}; rename it in your specs"
            )
        names |= entries.keys()
        yield entries


def native_tables(packages: Iterable[str]) -> list[tuple[Path, Mapping[str, NativeKernel]]]:
    """The native kernels of each package, by op, with the folder of their sources; PluginError for a duplicate."""
    packages = list(packages)
    read_table(packages, NATIVE, "KERNELS")
    return [(Path(_folder(f"{package}.{NATIVE}")), _entries(package, NATIVE, "KERNELS")) for package in packages]


def triton_table(packages: Iterable[str]) -> dict[str, Any]:
    """The launchers of Triton kernels by op; PluginError for a duplicate. Imports Triton."""
    return read_table(list(packages), TRITON, "KERNELS")


def triton_coded(packages: Iterable[str]) -> dict[str, str]:
    """The operands that Triton's launchers read as codes, by op. Imports Triton."""
    return read_table(list(packages), TRITON, "CODED")


def import_folder(folder: Path) -> str:
    """Imports a generated tree as a separate package and returns the package's name."""
    start = folder / "__init__.py"
    if not start.is_file():
        raise PluginError(
            f"plugin {folder} is not a generated folder; run `sagellm generate --specs MY_SPECS --out FOLDER`"
        )
    # Named by its path: two plugins with folders of the same name must not share modules.
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


def _entries(package: str, module: str, table: str) -> Mapping[str, Any]:
    try:
        entries: Mapping[str, Any] = getattr(import_module(f"{package}.{module}"), table)
        if package != BASE:
            dict(entries)  # imports all of it
    except Exception as error:  # a generated file that was edited or cut short may raise anything
        if package == BASE:
            raise
        folder = _folder(package)
        _forget(package)
        raise PluginError(_unusable(folder, error)) from error
    return entries


def _forget(package: str) -> None:
    """Removes a package and its modules from `sys.modules`, so that the next import reads the files again."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _unusable(folder: str | Path, error: Exception) -> str:
    return f"plugin {folder} cannot be imported ({type(error).__name__}: {error}); generate it again"


def _folder(package: str) -> str:
    module: ModuleType = sys.modules[package]
    return str(Path(module.__file__ or package).parent)
