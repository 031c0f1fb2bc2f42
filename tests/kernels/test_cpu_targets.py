"""Checks that the C++ kernels compile for processors other than this machine's, without code being generated."""

import platform
import subprocess
from pathlib import Path

import pytest
from native import needs_compiler

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.kernels.cpu import compiler

SOURCES = Path(cpu.__file__).parent
TARGETS = {
    "AVX2": "-march=x86-64-v3",
    "AVX-512": "-march=skylake-avx512",
    "AVX512_VNNI": "-march=cascadelake",
    "AVX512_BF16": "-march=cooperlake",
    "AMX": "-march=sapphirerapids",
}
VARIANTS = (
    ("linear", "sage::bf16", None),
    ("linear", "float", None),
    ("linear", "sage::bf16", "SAGE_WEIGHT=int6_codes"),
    ("linear", "sage::bf16", "SAGE_WEIGHT=int4_codes -DSAGE_INT8_ROWS=1"),
    ("experts", "float", "SAGE_WEIGHT=int8_codes -DSAGE_INT8_ROWS=1"),
    ("linear", "sage::bf16", "SAGE_WEIGHT=fp8_codes"),
    ("linear", "float", "SAGE_WEIGHT=fp8_codes"),
    ("experts", "sage::bf16", "SAGE_WEIGHT=fp4_codes"),
    ("embedding", "sage::bf16", "SAGE_WEIGHT=int6_codes"),
    ("attention", "sage::bf16", None),
    ("attention", "sage::bf16", "SAGE_KV=int8_kv"),
    ("qk", "sage::bf16", "SAGE_KV=fp8_kv"),
)
"""File, element type, and form of packed weights or of KV caches: each uses other microkernels."""


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are those of x86")
@pytest.mark.parametrize("flag", TARGETS.values(), ids=TARGETS)
def test_kernels_compile_for(flag: str) -> None:
    found = compiler.find_compiler()
    assert found is not None
    for file, element, form in VARIANTS:
        flags = [
            *compiler.compile_flags(),
            flag,
            "-fsyntax-only",
            f"-DSAGE_ELEMENT={element}",
            *(f"-D{form}".split() if form else []),
        ]
        command = [*found.command, *flags, f"-I{compiler.HEADERS}", str(SOURCES / f"{file}.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{file}.cpp for {element}, {form or 'plain'}:\n{result.stderr[:2000]}"
