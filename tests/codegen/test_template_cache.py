"""Cache of compiled templates: used only if no other user can write to it."""

import os
from pathlib import Path

import pytest

from sageLLM.codegen.render import _template_cache


def test_the_cache_is_private_for_any_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        folder = _template_cache()
    finally:
        os.umask(before)
    assert folder == tmp_path / "cache" / "templates"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    folder.chmod(0o777)
    assert _template_cache() is None
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert _template_cache() is None


def test_generation_needs_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("SAGELLM_CACHE_DIR", "/dev/null")
    assert _template_cache() is None
    monkeypatch.delenv("SAGELLM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert _template_cache() is None
