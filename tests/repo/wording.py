"""Finds the words that the style guide bans, in docs, docstrings, comments and messages; also a command.

python tests/repo/wording.py [--list] [PATH ...]     counts per folder, or every hit as file:line
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]

# Each pattern has a standard replacement: "returns", "requires", "without", "again", "next to", "is at".
PATTERNS = {
    "give for return or pass": r"\b(gives?|given|gave|giving)\b",
    "want": r"\b(wants?|wanted)\b",
    "whose": r"\bwhose\b",
    "who, nobody": r"\b(nobody|who|whom)\b",
    "is no, has no": r"\b(is|are|has|have|there's) no\b(?! longer\b)",
    "anew, beside, behind": r"\b(anew|beside|behind|lest)\b",
    "of its own": r"\bof (its|their) own\b",
    "lie, stand": r"\b(lies|lying|stands|standing)\b",
    "question clause": r"^(What|Who|Whose|Where|Which|How)\b(?!.*\?$)",
}
COMPILED = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}

Kind = Literal["heading", "first sentence", "message", "prose"]
STRICT: frozenset[Kind] = frozenset({"heading", "first sentence", "message"})


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of English: where it starts, what it is, and its text."""

    line: int
    kind: Kind
    text: str


def pieces_of(path: Path) -> Iterator[Piece]:
    """The English in a file, by its suffix; nothing for files that hold none."""
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".py":
            yield from _python(text)
        case ".md":
            yield from _markdown(text)
        case ".yaml" | ".toml":
            yield from _lines(text, r"(?:^|\s)#\s(.*)|^\s*(?:summary|doc|help|about): (.*)")
        case ".h" | ".cpp":
            yield from _lines(text, r"//\s?(.*)|\*\s(.*)")
        case ".jinja":
            yield from _lines(text, r"(?:#|//)\s(.*)|\{#-?\s(.*)|\"\"\"(.*)")


def _python(text: str) -> Iterator[Piece]:
    docstrings = set()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Module(body=body) | ast.ClassDef(body=body) | ast.FunctionDef(body=body):
                match body:
                    case [ast.Expr(value=ast.Constant(value=str(docstring)) as constant), *_]:
                        docstrings.add(id(constant))
                        opening, _, rest = " ".join(docstring.split()).partition(". ")
                        is_function = isinstance(node, ast.FunctionDef)
                        yield Piece(constant.lineno, "prose" if is_function else "first sentence", opening)
                        yield Piece(constant.lineno, "prose", rest)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(value)) if id(node) not in docstrings and value.count(" ") > 2:
                yield Piece(node.lineno, "message", value)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Piece(token.start[0], "prose", token.string.lstrip("# "))


def _markdown(text: str) -> Iterator[Piece]:
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and line.strip():
            is_heading = line.startswith("#")
            yield Piece(number, "heading" if is_heading else "prose", re.sub(r"`[^`]*`", "`", line.lstrip("#-*| ")))


def _lines(text: str, pattern: str) -> Iterator[Piece]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(pattern, line):
            yield Piece(number, "prose", next(group for group in found.groups() if group is not None))


def hits_of(path: Path, kinds: frozenset[Kind] | None = None) -> Iterator[tuple[Piece, str]]:
    """Every banned pattern of the file with its piece; `kinds` narrows the search."""
    for piece in pieces_of(path):
        if kinds is None or piece.kind in kinds:
            for name, pattern in COMPILED.items():
                for _ in pattern.finditer(piece.text):
                    yield piece, name


def hand_written_files(root: Path = ROOT) -> list[Path]:
    """The tracked text files that people write: no generated code, no fixtures of the generator."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    kept = [name for name in listed if not re.match(r"generated/|tests/codegen/cases/|_dev/sageLLM/\w+$", name)]
    return [root / name for name in kept if name.endswith((".py", ".md", ".yaml", ".h", ".cpp", ".jinja"))]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders (default: all hand-written files)")
    parser.add_argument("--list", action="store_true", help="print every hit instead of counts")
    options = parser.parse_args(arguments)
    chosen = [path.resolve() for path in options.paths]
    counts: dict[str, Counter[str]] = {}
    for path in hand_written_files():
        if chosen and not any(path.is_relative_to(one) for one in chosen):
            continue
        name = path.relative_to(ROOT).as_posix()
        for piece, pattern in hits_of(path):
            counts.setdefault(pattern, Counter())[name.split("/")[0]] += 1
            if options.list:
                print(f"{name}:{piece.line}: {piece.kind}: {pattern}: {piece.text.strip()[:140]}")
    for pattern, folders in counts.items():
        print(f"{folders.total():5}  {pattern:24} {', '.join(f'{k} {v}' for k, v in folders.most_common())}")
    print(f"{sum(c.total() for c in counts.values()):5}  in all")


if __name__ == "__main__":
    main(sys.argv[1:])
