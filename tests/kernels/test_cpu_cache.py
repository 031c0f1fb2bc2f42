"""Cache of native libraries: damaged files, folders of other users, and compilers that hang, fail or are killed."""

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sageLLM.runtime.kernels.cpu import cache, compiler
from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.compiler import CompileError, Compiler, find_compiler

FOUND = find_compiler()
needs_compiler = pytest.mark.skipif(FOUND is None, reason="no C++ compiler")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the libraries of a new cache."""
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[str, int], Path]:
    def write(name: str, value: int) -> Path:
        path = tmp_path / f"{name}.cpp"
        path.write_text(f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {value}; }}\n')
        return path

    return write


@pytest.fixture
def source(make_source: Callable[[str, int], Path]) -> Path:
    return make_source("one", 1)


@pytest.fixture
def make_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """make_cxx(commands) makes CXX a shell script, which reports a version and runs the commands to compile."""

    def write(commands: str) -> Path:
        script = tmp_path / "cxx"
        script.write_text(
            f'#!/bin/sh\nfor last; do :; done\ncase "$last" in --version) echo 1.0; exit;; esac\n{commands}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return write


def answer(library: Path) -> int:
    """The result of the library's function, in another process: loading a truncated file would end this one."""
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def truncate(path: Path) -> None:
    os.truncate(path, 4096)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_text(path: Path) -> None:
    path.write_text("not a library\n")


def replace_by_link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def let_others_write(path: Path) -> None:
    path.chmod(0o666)


@needs_compiler
@pytest.mark.parametrize(
    "damage", [truncate, empty, flip_a_bit, replace_by_text, replace_by_link, replace_by_fifo, let_others_write]
)
def test_a_damaged_library_is_built_again(kernels: Path, source: Path, damage: Callable[[Path], None]) -> None:
    library = build(source, "f32", FOUND)
    damage(library)
    with pytest.raises(CompileError, match="no C\\+\\+ compiler found"):
        build(source, "f32", None)
    assert answer(build(source, "f32", FOUND)) == 1
    assert len(list(kernels.iterdir())) == 1


@needs_compiler
def test_a_library_under_the_name_of_another_is_built_again(
    kernels: Path, source: Path, make_source: Callable[[str, int], Path]
) -> None:
    one, two = build(source, "f32", FOUND), build(make_source("two", 2), "f32", FOUND)
    shutil.copy(two, one)
    shutil.copy(two, one.with_name(one.name.rpartition("-")[0] + "-" + two.name.rpartition("-")[2]))
    assert answer(build(source, "f32", FOUND)) == 1


@needs_compiler
def test_files_and_folders_are_private_for_any_umask(kernels: Path, source: Path) -> None:
    before = os.umask(0)
    try:
        library = build(source, "f32", FOUND)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (kernels.parent, kernels, library)] == [
            0o700, 0o700, 0o600
        ]  # fmt: skip
        kernels.chmod(0o777)
        assert build(source, "f32", FOUND) == library and stat.S_IMODE(kernels.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the path belong to another user; root trusts root, so that only root must change the owner."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@needs_compiler
def test_a_folder_of_another_user_is_refused(kernels: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(source, "f32", FOUND)
    give_away(kernels, monkeypatch)
    with pytest.raises(CompileError, match=r"belongs to another user; set SAGELLM_CACHE_DIR to a folder that only"):
        build(source, "f32", FOUND)


def test_a_folder_that_others_can_replace_is_refused(
    kernels: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Path("/var/tmp", f"sagellm-test-{os.getpid()}")  # the parents of tmp_path are private
    shared.mkdir()
    try:
        shared.chmod(0o777)
        monkeypatch.setenv("SAGELLM_CACHE_DIR", str(shared / "cache"))
        with pytest.raises(CompileError, match=r"all users can rename files in .*: its sticky bit is not set"):
            build(source, "f32", None)
        shared.chmod(0o1777)
        with pytest.raises(CompileError, match=r"no C\+\+ compiler found"):
            build(source, "f32", None)
    finally:
        shutil.rmtree(shared)


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/sagellm", "file", "loop"])
def test_a_folder_that_cannot_be_made_is_a_compile_error(
    source: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / folder))
    with pytest.raises(CompileError, match=r"^cannot use the kernel cache: .*; set SAGELLM_CACHE_DIR to a folder"):
        build(source, "f32", FOUND)


def test_a_user_without_a_home_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SAGELLM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CompileError, match=r"the home folder is unknown; set SAGELLM_CACHE_DIR"):
        build(source, "f32", FOUND)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(FileNotFoundError):
        cache.cache_folder()


def test_a_file_that_the_system_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(CompileError, match=r"^cannot load .*text\.so.*; delete the file, or set SAGELLM_CACHE_DIR"):
        load(tmp_path / "text.so")
    with pytest.raises(CompileError, match="no_such_function"):
        symbol(ctypes.CDLL(None), "no_such_function")


@needs_compiler
def test_cached_libraries_are_used_without_a_compiler(
    kernels: Path, source: Path, make_source: Callable[[str, int], Path]
) -> None:
    library = build(source, "f32", FOUND)
    assert build(source, "f32", None) == library
    for other in ((source, "bf16"), (make_source("one", 2), "f32")):
        with pytest.raises(CompileError, match=r"no C\+\+ compiler found"):
            build(*other, None)


@needs_compiler
@pytest.mark.parametrize("arguments", ["-O2", "-O2 '-DTEXT=a b'"])
def test_cxx_may_have_arguments(kernels: Path, source: Path, monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    assert FOUND is not None
    monkeypatch.setenv("CXX", f"{FOUND.command[0]} {arguments}")
    found = find_compiler()
    assert found is not None and found.command[1] == "-O2" and len(found.command) == 1 + arguments.count("-")
    assert answer(build(source, "f32", found)) == 1


@pytest.mark.parametrize("cxx", ["no-such-compiler", "g++ 'unbalanced", "/", "false"])
def test_a_cxx_that_does_not_run_is_no_compiler(monkeypatch: pytest.MonkeyPatch, cxx: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert find_compiler() is None


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ("echo 'error: bad' >&2; exit 1", r"could not build one\.cpp:\nerror: bad"),
        ("kill -9 $$", r"could not build one\.cpp:\nexit status -9"),
        ("exit 0", r"wrote no library for one\.cpp; set CXX to a C\+\+ compiler"),
        ("echo $$ > pid; sleep 60 & wait", r"was stopped after 0\.5 s at one\.cpp; set SAGELLM_COMPILE_TIMEOUT"),
    ],
)
def test_compilers_that_fail_or_hang(
    kernels: Path, source: Path, make_cxx: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    commands: str, message: str,
) -> None:  # fmt: skip
    make_cxx(commands.replace("pid", str(source.parent / "pid")))
    monkeypatch.setenv("SAGELLM_COMPILE_TIMEOUT", "0.5")
    began = time.monotonic()
    with pytest.raises(CompileError, match=message):
        build(source, "f32", find_compiler())
    assert time.monotonic() - began < 20
    assert not list(kernels.iterdir())
    if "sleep" in commands:
        assert not group_runs(int((source.parent / "pid").read_text()))


def group_runs(group: int) -> bool:
    """Whether a process of the group is alive; a killed one may need a moment."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def test_a_compiler_that_hangs_at_its_version_is_no_compiler(
    make_cxx: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = make_cxx("")
    script.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(compiler, "VERSION_LIMIT", 0.5)
    assert find_compiler() is None


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "soon"])
def test_a_time_limit_must_be_positive(
    kernels: Path, source: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("SAGELLM_COMPILE_TIMEOUT", limit)
    with pytest.raises(CompileError, match=f"must be a number of seconds above 0, got '{limit}'"):
        build(source, "f32", Compiler(("true",), "1"))


BUILD_ONE = """
import sys
from pathlib import Path
from sageLLM.runtime.kernels.cpu.build import build
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
build(Path(sys.argv[1]), "f32", find_compiler())
"""


@needs_compiler
def test_what_a_killed_build_leaves_is_deleted(
    kernels: Path, source: Path, make_cxx: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds that run keep their folders."""
    started = source.parent / "started"
    make_cxx(f"echo $$ > {started}.new; mv {started}.new {started}; sleep 60")
    with subprocess.Popen([sys.executable, "-c", BUILD_ONE, source]) as process:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setattr(cache, "SETTLED", 0.0)
        build(source, "f32", FOUND)
        assert len(list(kernels.glob("build-*"))) == 1
        process.kill()
    os.killpg(int(started.read_text()), signal.SIGKILL)
    build(source, "bf16", FOUND)
    assert not list(kernels.glob("build-*"))
