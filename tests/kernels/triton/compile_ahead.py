"""A program: compiles every Triton kernel for GPUs that need not be there, and reports what each needs of them as JSON.

    python compile_ahead.py sm_90 gfx942

The launchers run as they are, on tensors without data. A stub stands in for the driver, so that Triton's own JIT
specialises the kernels to their arguments and compiles them, and a launch ends there.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.generated.ops import OPS
from sageLLM.generated.tests.op_checks import make_operands, run

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

SIZES = {"R": 64, "T": 64, "B": 32, "S": 32, "H": 4096, "I": 14336, "V": 128256, "P": 8192, "Nq": 32, "Nkv": 8, "N": 32}
SIZES |= {"K": 4096, "D": 128, "Dv": 128, "Dr": 128, "PG": 4096, "BS": 16, "MB": 256, "M": 64, "X": 64, "A": 8}
"""A model of 8 billion parameters; some of its sizes name two things, which is as well here."""
LONG = SIZES | {"H": 32768, "I": 32768}


class Stub(DriverBase):
    """What the JIT asks of a driver before a launch. Kernels are kept by device id, so each target has its own."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a device")


def compiled(name: str, sizes: dict[str, int], attrs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The kernels that one call of the op's launcher would start, by name."""
    found: list[tuple[str, Any]] = []
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = record
    try:
        with torch.device("meta"):
            run(OPS[name], KERNELS[name], operands(name, sizes), sizes, attrs)
    finally:
        JITFunction.run = original
    return iter(found)


def operands(name: str, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    return {key: x.to("meta") for key, x in make_operands(OPS[name], sizes, {}, torch.bfloat16).items()}


def cases(name: str) -> list[tuple[str, dict[str, int], dict[str, Any]]]:
    """What to compile of an op: as it is called most, and its kernel for long rows if it has one."""
    attrs = {key: 1.0 for key, spec in OPS[name].attr_types.items() if spec.type == "f32" and spec.default is None}
    found = [("", SIZES, {key: value for key, value in attrs.items() if not OPS[name].attr_types[key].optional})]
    if any(symbol in "HI" for type_ in OPS[name].input_types.values() for symbol in map(str, type_.trailing)):
        found.append(("", LONG, found[0][2]))
    return found


def needs(kernel: Any, target: GPUTarget) -> dict[str, Any]:
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        counts = {
            key: int(found[1])
            for key in ("vgpr_count", "vgpr_spill_count")
            if (found := re.search(rf"\.{key}:\s+(\d+)", text))
        }
        return {
            "registers": counts["vgpr_count"],
            "spilled": counts["vgpr_spill_count"],
            "shared": kernel.metadata.shared,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "-res-usage", file.name)))
        code = tool("nvdisasm", "-c", file.name)
    opcodes = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|LDG\.E\.128|STG\.E\.128|LDGSTS\.E\.\w*\.?128)\b", code)))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]),
        "shared": kernel.metadata.shared,
        "opcodes": opcodes,
    }


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main(targets: list[str]) -> None:
    report: dict[str, dict[str, Any]] = {}
    for device, target in enumerate(targets):
        driver.set_active(Stub(TARGETS[target], device))
        found = report.setdefault(target, {})
        for name in KERNELS:
            for _, sizes, attrs in cases(name):
                for kernel_name, kernel in compiled(name, sizes, attrs):
                    found.setdefault(kernel_name, needs(kernel, TARGETS[target]))
    json.dump({"triton": triton.__version__, "targets": report}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
