"""Times norms fused into projections on the CPU: one kernel and the two that it replaces, in turn; medians count.

python benchmarks/prologues_cpu.py [--dtypes bf16,f32] [--rows 1,16,128,1024] [--seconds 2] [--shape 576,1536]

One thread, processor time. The fused op is `norm_linear` of tests/kernels/prologues, generated into a temporary folder.
"""

import argparse
import importlib
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from linear_cpu import DTYPES, Timer, native_library

from sageLLM.codegen import driver
from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.cpu.packing import PackedWeight, pack

SPECS = Path(__file__).parents[1] / "tests/kernels/prologues"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bf16,f32")
    parser.add_argument("--rows", default="1,16,128,1024")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--shape", default="576,1536", help="the width of the rows and the number of output features")
    given = parser.parse_args()
    torch.set_num_threads(1)
    inner, features = map(int, given.shape.split(","))
    library = native_library()
    norm, linear = (NativeCallable(cpu.KERNELS[op], library, reference.KERNELS[op]) for op in ("rms_norm", "linear"))
    with TemporaryDirectory() as folder:
        fused = fused_kernel(Path(folder) / "prologues_tree")
        for dtype in (DTYPES[name] for name in given.dtypes.split(",")):
            w, m = torch.randn(inner).to(dtype), (torch.randn(features, inner) / inner**0.5).to(dtype)
            weight: torch.Tensor | PackedWeight = pack(m, 1, library)
            for rows in map(int, given.rows.split(",")):
                x = torch.randn(rows, inner).to(dtype)
                one, two = map(median, Timer(1, given.seconds).all(
                    lambda _, x=x, w=w, m=weight if fused.kernel.packed else m: fused(x, w, m),
                    lambda _, x=x, w=w, m=weight: linear(norm(x, w), m),
                ))  # fmt: skip
                times = f"one kernel {one * 1e6:8.0f} us, two {two * 1e6:8.0f} us"
                print(f"{dtype}, {rows} rows: {times}, ratio {one / two:.2f}", flush=True)


def fused_kernel(tree: Path) -> NativeCallable:
    driver.generate_from_scratch([SPECS], tree)
    sys.path.insert(0, str(tree.parent))
    kernels = importlib.import_module(f"{tree.name}.kernels.cpu").KERNELS
    references = importlib.import_module(f"{tree.name}.kernels.reference").KERNELS
    library = Library(kernels, tree / "kernels/cpu", compiler.find_compiler())
    return NativeCallable(kernels["norm_linear"], library, references["norm_linear"])


if __name__ == "__main__":
    main()
