"""A mutant: a small fault in the source text of one module, with the tests that must fail because of it."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """In `file` the text `old`, which occurs once, becomes `new`. `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        return ROOT / self.file

    def source(self) -> str:
        """The text of the module with the fault."""
        text = self.path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, (
            f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}"
        )
        return text.replace(self.old, self.new)
