"""Incremental update of a generated tree.

Modules that link and render are imported only if something changed, because the imports take longer than the check.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.codegen.folders import file_digest, file_digests, spec_files, spec_roots, template_files
from sageLLM.codegen.render import Output, format_sources
from sageLLM.codegen.state import FileRecord, State, UnitRecord, formatter_key, generator_key, load_state, save_state
from sageLLM.codegen.swap import MANIFEST, complete
from sageLLM.codegen.writer import (
    ManifestLine,
    Tree,
    Written,
    manifest_of,
    refuse_twice,
    replace_files,
    text_digest,
)

if TYPE_CHECKING:
    from sageLLM.codegen.expectations import Count
    from sageLLM.codegen.incremental import Incremental

PACKAGE = Path(__file__).resolve().parent.parent


def update(folders: Sequence[Path], out: Path, package_out: Path, count: "Count | None" = None) -> Written:
    """Updates the tree at `out` for the spec folders; the first is the package's.

    With `count`, expectations are checked if code changed that counts depend on. For an overlay, the state of
    `package_out` tells which entries of the package are known to be sound. Raises SpecErrors or Undeclared, with the
    tree unchanged, if only a run from scratch can produce the result.
    """
    groups = [file_digests(group) for group in spec_files(folders)]
    files = {name: file for group in groups for name, file in group.items()}
    templates = template_files(folders)
    base = frozenset(groups[0] if len(groups) > 1 else ())
    complete(out)
    tree, state, generator = Tree(out), load_state(out), generator_key(PACKAGE)
    seen = [(name, digest) for name, (_, digest) in files.items()]
    seen += [(name, file_digest(path)) for name, path in templates.values()]
    if state.generator == generator and _is_up_to_date(state, seen, base, tree):
        return Written((), (), len(state.outputs) + 1)
    from sageLLM.codegen.incremental import Incremental
    from sageLLM.codegen.spec_files import SpecFiles

    old = _known(state, generator, spec_roots(folders)[0], package_out if base else None)
    spec_files_read = SpecFiles(files, base, old.files, templates)
    run = Incremental(spec_files_read, old, lambda unit: _is_intact(unit, tree))
    run.run()
    # Formatting does not depend on the generator, so that its results also hold after a change of a template.
    formatted = state.outputs if state.formatter == formatter_key() else {}
    return _finish(run, generator, formatted, tree, count)


def _known(state: State, generator: str, root: str, package_out: Path | None) -> State:
    """The part of the state that holds for this generator; for a new overlay, link records of the package.

    `root` is the name of the package's spec folder in this run.
    """
    if state.generator == generator:
        return state
    package = load_state(package_out) if package_out is not None else State()
    if package.generator != generator:
        return State()
    renamed = (facts.moved(f"{root}/{name.partition('/')[2]}") for name, facts in package.files.items())
    return State(files=dict(renamed), ops=package.ops, links=package.links)


def _is_up_to_date(state: State, seen: list[tuple[str, str]], base: frozenset[str], tree: Tree) -> bool:
    """Whether the state is that of these files, by name and digest."""
    if [(name, facts.digest) for name, facts in state.files.items()] != seen or frozenset(state.base) != base:
        return False
    return all(_is_intact(unit, tree) for unit in state.units.values()) and tree.holds(MANIFEST, state.manifest)


def _is_intact(unit: UnitRecord, tree: Tree) -> bool:
    return all(tree.holds(file.path, file.output) for file in unit.files)


def _finish(
    run: "Incremental", generator: str, formatted: Mapping[str, FileRecord], tree: Tree, count: "Count | None"
) -> Written:
    """Formats the rendered files, checks expectations, and writes files and state."""
    rendered = [file for unit in run.units.values() for file in unit.files if isinstance(file, Output)]
    refuse_twice((file.path, file.entries) for unit in run.units.values() for file in unit.files)
    texts = _formatted(rendered, formatted, tree)
    units = {name: UnitRecord(unit.key, tuple(_record(file, texts) for file in unit.files))
             for name, unit in run.units.items()}  # fmt: skip
    records = [file for unit in units.values() for file in unit.files]
    manifest = manifest_of(ManifestLine(file.path, file.entries, file.inputs, file.output) for file in records)
    outputs = [Output(file.path, texts.get(file.path) or tree.text(file.path) or "") for file in records] + [manifest]
    changed = [output for output in outputs if output.text != tree.text(output.path)]
    counted = [output for output in changed if output.path not in run.paths_of_equal_interfaces]
    if count is not None and _is_counted_again(counted, tree):
        from sageLLM.codegen.expectations import check_expectations

        check_expectations(run.raw, outputs, count)
    written = replace_files(changed, {output.path for output in outputs}, tree.out)
    state = State(
        generator=generator,
        formatter=formatter_key(),
        base=tuple(sorted(run.facts.base)),
        files=dict(run.facts.files),
        ops=run.op_records,
        links=run.links,
        units=units,
        manifest=text_digest(manifest.text),
    )
    save_state(state, tree.out)
    return written.with_notes(rendered)


def _formatted(rendered: Iterable[Output], known: Mapping[str, FileRecord], tree: Tree) -> dict[str, str]:
    """The final texts by path. A file with the same unformatted text as before is taken from the tree."""
    texts: dict[str, str] = {}
    pending: list[Output] = []
    for output in rendered:
        record, text = known.get(output.path), tree.text(output.path)
        is_same = record is not None and record.inputs == text_digest(output.text)
        if record is not None and is_same and text is not None and tree.holds(output.path, record.output):
            texts[output.path] = text
        else:
            pending.append(output)
    return texts | {output.path: output.text for output in format_sources(pending)}


def _record(file: Output | FileRecord, texts: Mapping[str, str]) -> FileRecord:
    if isinstance(file, FileRecord):
        return file
    return FileRecord(file.path, file.entries, text_digest(file.text), text_digest(texts[file.path]), file.rows)


def _is_counted_again(changed: Iterable[Output], tree: Tree) -> bool:
    """Whether code changed on which counts depend."""
    from sageLLM.codegen.expectations import COUNTED, counts_alike

    for output in changed:
        if output.path.startswith(COUNTED):
            before = tree.text(output.path)
            if before is None or not counts_alike(before, output.text):
                return True
    return False
