"""Applies patches, which edit inherited statements of a layout."""

from collections.abc import Iterator
from typing import Any

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.link.flat_layout import FlatChoose, Located, flat_lines, inner_bodies
from sageLLM.codegen.schema.models import PatchSpec


def apply_patch(patch: Located[PatchSpec], body: list[Any], sink: Sink) -> None:
    """Edits the one statement that begins with the anchor; reports an anchor that does not match exactly once.

    A patch that matched twice, or not at all, would change the meaning of a layout silently when its base is edited.
    """
    kind, anchor = _anchor(patch.value)
    texts = [(items, item, _anchor_text(item)) for items in _bodies(body) for item in items]
    found = [(items, item, text) for items, item, text in texts if normalized(text).startswith(normalized(anchor))]
    if len(found) != 1:
        candidates = [text for _, _, text in found or texts if text]
        message = f"a patch must match exactly one statement, but '{anchor}' matches {len(found) or 'none'}"
        help = ("use a longer anchor; it matches: " if found else "the statements: ") + "; ".join(candidates)
        sink.error("SAGE202", message, patch.span(kind), help)
        return
    items, item, _ = found[0]
    at = items.index(item)
    key, added = ("with", patch.value.with_) if kind == "replace" else ("add", patch.value.add)
    new = flat_lines(added or [], patch.entry, (*patch.path, key))
    start, stop = {"before": (at, at), "after": (at + 1, at + 1), "replace": (at, at + 1)}[kind]
    items[start:stop] = new


def _bodies(body: list[Any]) -> Iterator[list[Any]]:
    """The list of statements, and those inside its loops and branches."""
    yield body
    for item in body:
        for inner in inner_bodies(item):
            yield from _bodies(inner)


def _anchor_text(item: Any) -> str:
    """The text that patches match: that of a statement, or the first condition of a `choose`."""
    if isinstance(item, FlatChoose):
        when = item.branches[0].when
        return f"when {when.value}" if when is not None else ""
    return item.value if isinstance(item, Located) else ""


def _anchor(patch: PatchSpec) -> tuple[str, str]:
    anchors = {"before": patch.before, "after": patch.after, "replace": patch.replace}
    return next((kind, text) for kind, text in anchors.items() if text is not None)


def normalized(text: str) -> str:
    """The text with runs of whitespace collapsed."""
    return " ".join(text.split())
