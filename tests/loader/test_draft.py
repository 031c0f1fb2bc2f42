"""Drafts of checkpoints: they become the target when they are whole, and nothing else is touched."""

from pathlib import Path

import pytest

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.draft import draft_of


def test_a_draft_becomes_the_target(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b.gguf"
    with draft_of(out) as draft:
        draft.write_bytes(b"x")
        assert not out.exists()
    assert out.read_bytes() == b"x" and [*out.parent.iterdir()] == [out]


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), OSError(28, "No space left on device")])
def test_a_draft_is_removed_after_an_error(is_folder: bool, error: Exception, tmp_path: Path) -> None:
    expected = (
        (CheckpointError, "cannot be written: No space left") if isinstance(error, OSError) else (ValueError, "no")
    )
    with pytest.raises(expected[0], match=expected[1]), draft_of(tmp_path / "out") as draft:
        if is_folder:
            draft.mkdir()
            (draft / "x").write_text("")
        else:
            draft.write_text("")
        raise error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["out", "out.part"])
def test_what_exists_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("")
    with pytest.raises(CheckpointError, match=rf"{name} (already )?exists"), draft_of(tmp_path / "out"):
        raise AssertionError("the draft was begun")
    assert (tmp_path / name / "mine").exists()


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_a_path_without_a_name(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="already exists; choose another path"), draft_of(Path(out)):
        raise AssertionError("the draft was begun")
