"""Lint of the English in docs, docstrings, comments and messages, by docs/style.md; also a command.

python tests/repo/wording.py [PATH ...]            counts per pattern and folder, and the density of comments
python tests/repo/wording.py --list [PATH ...]     every hit as file:line
python tests/repo/wording.py --check [PATH ...]    headings, first sentences and messages only; exit code 1 on a hit
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]

# Each pattern with what to write instead.
PATTERNS = {
    "give": (r"\b(gives?|given|gave|giving)\b", "return, produce, pass, set"),
    "want": (r"\b(wants?|wanted)\b", "expect, require, request"),
    "whose": (r"\bwhose\b", "'with', 'of which', or two sentences"),
    "who": (r"\b(nobody|who|whom)\b", "a noun"),
    "is no": (r"\b(is|are|has|have|there's) no\b(?! (?:longer|attribute)\b)", "is not, without, expected X"),
    "anew": (r"\b(anew|beside|behind|lest)\b", "again, next to, after, so that"),
    "of its own": (r"\bof (its|their) own\b", "separate, its own"),
    "lie, stand": (r"\b(lies|lying|stands|standing)\b", "is, is in, follows"),
    "told": (r"\b(is|are) told\b|\bsits? out\b", "receives, is skipped"),
    "question clause": (r"^(What|Who|Whose|Where|Which|How)\b(?!.*\?$)", "a noun phrase, or 'Verbs the X'"),
}
COMPILED = {name: re.compile(pattern) for name, (pattern, _) in PATTERNS.items()}
ANY = re.compile("|".join(f"(?:{pattern})" for pattern, _ in PATTERNS.values()))

COMMENT = {
    ".h": (CPP := r"//\s?(.*)|\*\s(.*)"),
    ".cpp": CPP,
    ".jinja": r"(?:#|//)\s(.*)|\{#-?\s(.*)|\"\"\"(.*)",
}

Kind = Literal["heading", "first sentence", "message", "prose"]
STRICT: frozenset[Kind] = frozenset({"heading", "first sentence", "message"})


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of English: its first line, its kind and its text."""

    line: int
    kind: Kind
    text: str


def pieces_of(path: Path) -> Iterator[Piece]:
    """The English in a file, by its suffix; empty for other suffixes."""
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".py":
            yield from _docstrings_and_messages(text)
            yield from _comments(text)
        case ".md":
            yield from _markdown(text)
        case ".yaml":
            yield from _summaries(text)
            yield from _lines(text, r"(?:^|\s)#\s(.*)|^\s*(?:doc|help|about): (.*)")
        case ".h" | ".cpp" | ".jinja":
            yield from _opening(text)
            yield from islice(_lines(text, COMMENT[path.suffix]), 1, None)


def _opening(text: str) -> Iterator[Piece]:
    """The first comment of a C++ file or template, which says what the file is for."""
    for piece in islice(_lines(text, COMMENT[".jinja"]), 1):
        yield replace(piece, kind="first sentence")


def _docstrings_and_messages(text: str) -> Iterator[Piece]:
    nodes = [*ast.walk(ast.parse(text))]
    seen = set()  # docstrings, and the constant parts of f-strings
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            docstring = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(docstring, ast.Constant) and isinstance(docstring.value, str):
                seen.add(id(docstring))
                opening, _, rest = " ".join(docstring.value.split()).partition(". ")
                is_named = isinstance(node, ast.Module | ast.ClassDef)
                yield Piece(docstring.lineno, "first sentence" if is_named else "prose", opening)
                yield Piece(docstring.lineno, "prose", rest)
        elif isinstance(node, ast.JoinedStr):
            seen.update(id(part) for part in node.values)
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield from _message(node.lineno, "".join(parts))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen:
            yield from _message(node.lineno, node.value)


def _comments(text: str) -> Iterator[Piece]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Piece(token.start[0], "prose", token.string.lstrip("# "))


def _message(line: int, text: str) -> Iterator[Piece]:
    if text.count(" ") > 1:  # else a name, a key or a word
        yield Piece(line, "message", text)


def _markdown(text: str) -> Iterator[Piece]:
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and line.strip():
            is_heading = line.startswith("#")
            yield Piece(number, "heading" if is_heading else "prose", re.sub(r"`[^`]*`", "`", line.lstrip("#-*| ")))


def _summaries(text: str) -> Iterator[Piece]:
    """The summaries of spec entries, which become docstrings of generated classes."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"^\s*summary: (.*)", line):
            yield Piece(number, "first sentence", found[1])


def _lines(text: str, pattern: str) -> Iterator[Piece]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(pattern, line):
            yield Piece(number, "prose", next(group for group in found.groups() if group is not None))


def hits_of(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, str]]:
    """Every pattern found in the pieces, with its piece."""
    for piece in pieces:
        if ANY.search(piece.text):
            for name, pattern in COMPILED.items():
                for _ in pattern.finditer(piece.text):
                    yield piece, name


def strict_pieces(path: Path) -> Iterator[Piece]:
    """Headings, first sentences and messages, which must be free of hits."""
    readers = {".py": _docstrings_and_messages, ".md": _markdown, ".yaml": _summaries}
    readers |= dict.fromkeys((".h", ".cpp", ".jinja"), _opening)
    pieces = readers[path.suffix](path.read_text(encoding="utf-8"))
    return (piece for piece in pieces if piece.kind in STRICT)


def tracked_files(root: Path = ROOT) -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def hand_written_files() -> list[str]:
    """The tracked text files that people write: no generated code, no fixtures, not this lint."""
    skipped = re.compile(r"generated/|tests/codegen/cases/|tests/repo/(test_)?wording\.py$|_dev/sageLLM/\w+$")
    suffixes = (".py", ".md", ".yaml", ".h", ".cpp", ".jinja")
    return [name for name in tracked_files() if name.endswith(suffixes) and not skipped.match(name)]


def checked_files() -> list[str]:
    """The hand-written files and the generated pages."""
    pages = [name for name in tracked_files() if name.startswith("generated/docs/") and name.endswith(".md")]
    return hand_written_files() + pages


def comment_density(names: Iterable[str]) -> float:
    """Comments per 100 lines of code; a line of code is neither blank nor a comment."""
    num_comments = num_lines = 0
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        num_comments += sum(1 for _ in _comments(text))
        num_lines += sum(1 for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return 100 * num_comments / num_lines


def check(names: Iterable[str]) -> int:
    """Prints every hit in a heading, first sentence or message; the number of hits."""
    num_hits = 0
    for name in names:
        for piece, pattern in hits_of(strict_pieces(ROOT / name)):
            num_hits += 1
            print(f"{name}:{piece.line}: {piece.kind}: {piece.text.strip()[:100]!r}")
            print(f"    = help: '{pattern}' is not standard here; write {PATTERNS[pattern][1]}")
    return num_hits


def count(names: Sequence[str], *, list_hits: bool) -> None:
    """Prints the hits per pattern and top-level folder, and the density of comments."""
    counts: dict[str, Counter[str]] = {}
    for name in names:
        for piece, pattern in hits_of(pieces_of(ROOT / name)):
            counts.setdefault(pattern, Counter())[name.split("/")[0]] += 1
            if list_hits:
                print(f"{name}:{piece.line}: {piece.kind}: {pattern}: {piece.text.strip()[:140]}")
    for pattern, folders in counts.items():
        print(f"{folders.total():5}  {pattern:16} {', '.join(f'{k} {v}' for k, v in folders.most_common())}")
    print(f"{sum(c.total() for c in counts.values()):5}  total")
    code = [name for name in names if name.startswith(("codegen/", "runtime/")) and name.endswith(".py")]
    if code:
        print(f"{comment_density(code):5.2f}  comments per 100 lines of code in codegen/ and runtime/")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders (default: all)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print every hit, not only the counts")
    mode.add_argument("--check", action="store_true", help="print the hits that may not be, and fail if there are any")
    options = parser.parse_args(arguments)
    chosen = [path.resolve() for path in options.paths]
    names = checked_files() if options.check else hand_written_files()
    if chosen:
        names = [name for name in names if any((ROOT / name).is_relative_to(path) for path in chosen)]
    if options.check:
        return 1 if check(names) else 0
    count(names, list_hits=options.list)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
