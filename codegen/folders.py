"""Spec folders of a run: the name of every spec file in diagnostics and headers, and folders that cannot be used."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
KERNEL_TEMPLATES = {"reference": ".py.jinja", "cpu": ".cpp.jinja", "triton": ".py.jinja"}
"""Folders below `templates` of a spec folder, with the ends of their files' names."""
PACKAGE_PREFIX = "sageLLM/"
"""Precedes the names of the package's spec files if an overlay folder has the same name, usually `specs`."""


def spec_roots(folders: Sequence[Path]) -> list[str]:
    """The first part of the display names of each folder; the first folder is the package's."""
    names = [folder.resolve().name for folder in folders]
    return [PACKAGE_PREFIX + names[0], *names[1:]] if names[0] in names[1:] else names


def origin(name: str) -> str:
    """The display name of a package's spec file, as in a run without overlays."""
    return name.removeprefix(PACKAGE_PREFIX)


def spec_files(folders: Sequence[Path]) -> list[dict[str, Path]]:
    """The YAML files of each folder in order, by display name, which is unique.

    Raises SpecErrors for a folder without specs, and for two overlays with files of the same display name.
    """
    roots = spec_roots(folders)
    groups = [dict(_paths(folder, root)) for folder, root in zip(folders, roots, strict=True)]
    findings = [_unusable(folder) for folder, group in zip(folders, groups, strict=True) if not group]
    findings += _misnamed(folders) + _same_places(folders)
    seen: dict[str, Path] = {}
    for group in groups:
        for name, path in group.items():
            if name in seen and not seen[name].samefile(path):
                message = f"two spec folders contain '{name}': {seen[name]} and {path}"
                findings.append(Diagnostic("SAGE504", message, help="rename one of the files or folders"))
            seen.setdefault(name, path)
    if findings:
        raise SpecErrors(findings)
    return groups


def template_files(folders: Sequence[Path]) -> dict[str, tuple[str, Path]]:
    """Kernel templates of the overlays: display name and path by the name of the template, `cpu/NAME.cpp.jinja`.

    Raises SpecErrors for a file in another place, and for a template of the package or of two overlays.
    """
    found: dict[str, tuple[str, Path]] = {}
    findings = []
    for folder, root in list(zip(folders, spec_roots(folders), strict=True))[1:]:
        for path in sorted(folder.rglob("*.jinja")):
            name = path.relative_to(folder).as_posix().removeprefix("templates/")
            if why := _why_not_a_template(path.relative_to(folder).as_posix()):
                findings.append(Diagnostic("SAGE123", f"'{path}' cannot be used: {why}", help="move or rename it"))
            elif (TEMPLATES / name).is_file() or name in found:
                other = found[name][1] if name in found else TEMPLATES / name
                message = f"two templates have the name '{name}': {path} and {other}"
                findings.append(Diagnostic("SAGE504", message, help="rename the template and the `reference`"))
            else:
                found[name] = (f"{root}/templates/{name}", path)
    if findings:
        raise SpecErrors(findings)
    return found


def _why_not_a_template(path: str) -> str | None:
    for kind, end in KERNEL_TEMPLATES.items():
        if re.fullmatch(rf"templates/{kind}/_?[a-z][a-z0-9_]*{re.escape(end)}", path):
            return None
    expected = ", ".join(f"templates/{kind}/NAME{end}" for kind, end in KERNEL_TEMPLATES.items())
    return f"expected one of {expected} in the spec folder"


def file_digests(files: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Path and digest of every spec file, by display name."""
    return {name: (path, file_digest(path)) for name, path in files.items()}


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file with a display name."""
    for folder, root in zip(folders, spec_roots(folders), strict=True):
        if name.startswith(f"{root}/") and (path := folder / name[len(root) + 1 :]).is_file():
            return path
    return None


def _paths(folder: Path, root: str) -> Iterator[tuple[str, Path]]:
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.yaml")):
        yield f"{root}/{name}", path


def _unusable(folder: Path) -> Diagnostic:
    return Diagnostic("SAGE502", f"a spec folder must contain .yaml files, got '{folder.name}'", help="check --specs")


def _misnamed(folders: Sequence[Path]) -> list[Diagnostic]:
    """Files that would be skipped without a word."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*.[yY]*[mM][lL]")) if path.suffix != ".yaml")
    return [
        Diagnostic("SAGE502", f"a spec file must end with .yaml, got '{path}'", help=f"rename it to {path.stem}.yaml")
        for path in paths
        if path.suffix.lower() in (".yml", ".yaml")
    ]


def _same_places(folders: Sequence[Path]) -> list[Diagnostic]:
    """Folders that are used twice."""
    findings, seen = [], {folders[0].resolve()}
    for folder in folders[1:]:
        place = folder.resolve()
        if place == folders[0].resolve():
            message = f"'{folder}' is the package's spec folder, which is always used"
            findings.append(Diagnostic("SAGE502", message, help="leave out --specs, or name another folder"))
        elif place in seen:
            message = f"the spec folder '{folder}' is used twice"
            findings.append(Diagnostic("SAGE502", message, help="leave out one --specs"))
        seen.add(place)
    return findings
