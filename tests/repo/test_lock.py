"""Tests of the lock files: pins of constraints.txt with hashes, and everything that pyproject.toml declares."""

import re

import lock
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILES = ("requirements.lock", "requirements-test.lock")
TEXTS = {name: (lock.ROOT / name).read_text(encoding="utf-8") for name in FILES}
PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (lock.ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
)
LOCKED = {name: lock.entries(text) for name, text in TEXTS.items()}


def test_every_pin_is_in_one_lock_file_with_its_version() -> None:
    """After a change of constraints.txt: `make lock`."""
    running, testing = LOCKED.values()
    assert running.keys().isdisjoint(testing)
    found = {name: text.split()[0].partition("==")[2] for name, text in {**running, **testing}.items()}
    assert found == {name: version for name, version in PINS.items() if name not in lock.UNLOCKED}


@pytest.mark.parametrize("name", FILES)
def test_a_lock_file_consists_of_pins_with_hashes(name: str) -> None:
    assert TEXTS[name] == lock.HEADER + "".join(LOCKED[name].values())
    for text in LOCKED[name].values():
        assert re.fullmatch(
            r"\S+==\S+( ; [^\\\n]+)? \\\n(?:    --hash=sha256:[0-9a-f]{64} \\\n)*    --hash=sha256:[0-9a-f]{64}\n", text
        )


def test_declared_dependencies_are_locked() -> None:
    declared = lock.dependencies()
    running, testing = (set(entries) for entries in LOCKED.values())
    for kind, found in (("", running), ("serve", running), ("test", running | testing)):
        assert {canonicalize_name(Requirement(one).name) for one in lock.locked(declared[kind])} <= found
    assert lock.BUILD in running


def test_requirements_of_torch_without_libraries_of_gpus() -> None:
    found = lock.pure(
        ["sympy>=1.13", "nvidia-cublas==13; platform_system == 'Linux'", "triton==3.6", "opt; extra == 'a'"]
    )
    assert found == ["sympy", "triton"]
    assert lock.locked(found) == ["sympy"]


def test_entries_of_a_lock_file() -> None:
    text = "# Made by hand.\na-b==1.0 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\nc==2 \\\n    --hash=sha256:2\n"
    assert lock.entries(text) == {
        "a-b": "a-b==1.0 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\n",
        "c": "c==2 \\\n    --hash=sha256:2\n",
    }
