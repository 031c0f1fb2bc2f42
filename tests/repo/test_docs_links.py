"""Checks of docs/ and the READMEs: links and paths exist, and pictures are those that their scripts make."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT, each_page, prose_of

IMAGES = ROOT / "docs" / "images"
FOLDERS = ("benchmarks", "codegen", "docs", "examples", "generated", "runtime", "specs", "templates", "tests")


def broken_links(page: Path) -> list[str]:
    text = prose_of(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    broken = []
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(f"{page.name}: {target}")
    return broken


@each_page
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_links_of_generated_pages_resolve() -> None:
    pages = [*ROOT.glob("generated/docs/**/*.md")]
    assert pages
    assert [link for page in pages for link in broken_links(page)] == []


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose_of(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_paths_exist(page: Path) -> None:
    """Paths from the top-level folders in the prose; `*` and capitals stand for part of a name.

    Hidden folders, such as the state of incremental updates, are not part of a new checkout.
    """
    text = prose_of(page.read_text(encoding="utf-8"))
    paths = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]", text))
    paths = {path for path in paths if "/." not in path}
    assert sorted(path for path in paths if not [*ROOT.glob(re.sub(r"[A-Z]{4,}", "*", path))]) == []


@pytest.fixture(scope="module")
def make_images() -> Iterator[ModuleType]:
    sys.path.insert(0, str(IMAGES))
    try:
        spec = importlib.util.spec_from_file_location("make_images", IMAGES / "make_images.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(IMAGES))


def test_svg_files_are_those_that_the_scripts_make(make_images: ModuleType) -> None:
    stale = [path.name for path, text in make_images.svg_files().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python docs/images/make_images.py"
