"""Times products with weights of codes, activations as they are and in 8 bits, against bf16: one thread, cold weights.

    python benchmarks/coded_products.py [--product 1024x4096] [--rows 1,4,16,256] [--forms int8:0,int4:32] [--seconds 2]

A form is its name and the inputs of a group, 0 for all of them. Calls of all forms take turns; the least processor time
of each counts, and the table shows multiples of the rate in bf16. `a8` is with activations of 8 bits.
"""

import argparse
import ctypes
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, pack_codes, words_of
from sageLLM.runtime.kernels.cpu.library import Library, kernel_function
from sageLLM.runtime.kernels.cpu.packing import PackedWeight, pack

COLD_BYTES = 160_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product", default="1024x4096")
    parser.add_argument("--rows", default="1,4,16,256")
    parser.add_argument("--forms", default="int8:0,int8:32,int4:32,int4:128")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    inner, features = map(int, args.product.split("x"))
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler.find_compiler())
    library.set_num_threads()
    weights = {"bf16": copies(pack(torch.randn(features, inner).bfloat16(), 1, library))}
    for form in args.forms.split(","):
        plain = random_codes(features, inner, *form.split(":"))
        for name, activations in ((form, None), (f"{form} a8", "int8")):
            weights[name] = copies(pack_codes(replace(plain, activations=activations), 1))
    print("rows".ljust(8) + "".join(name.rjust(14) for name in weights))
    for rows in map(int, args.rows.split(",")):
        best = least_times(library, weights, rows, args.seconds)
        print(f"{rows:<8}" + "".join(f"{best['bf16'] / best[name]:14.2f}" for name in weights), flush=True)


def random_codes(features: int, inner: int, form: str, group: str) -> CodedWeight:
    size = int(group) or inner
    codes = words_of(torch.randint(0, 2 ** FORMS[form].bits, (features, inner)), FORMS[form])
    scales = (torch.rand(features, -(-inner // size)) + 0.5).bfloat16() / 32
    return CodedWeight(form, torch.Size((features, inner)), size, codes, scales)


def copies(weight: PackedWeight) -> list[PackedWeight]:
    """More than the caches hold."""
    return [replace(weight, values=weight.values.clone()) for _ in range(COLD_BYTES // weight.values.nbytes + 1)]


def least_times(library: Library, weights: dict[str, list[PackedWeight]], rows: int, seconds: float) -> dict[str, int]:
    """Nanoseconds by form."""
    features, inner = weights["bf16"][0].shape
    x, y = torch.randn(rows, inner).bfloat16(), torch.empty(rows, features, dtype=torch.bfloat16)
    sizes = (ctypes.c_int64 * 6)(rows, inner, features, inner, inner, features)
    functions: dict[str, Any] = {
        name: kernel_function(library.address("linear", "bf16", form=held[0].native)) for name, held in weights.items()
    }
    best = dict.fromkeys(weights, 2**62)
    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end or turn < 3:
        for name, held in weights.items():
            pointers = (ctypes.c_void_p * 4)(x.data_ptr(), held[turn % len(held)].data_ptr(), None, y.data_ptr())
            start = time.thread_time_ns()
            functions[name](pointers, sizes, None)
            best[name] = min(best[name], time.thread_time_ns() - start)
        turn += 1
    return best


if __name__ == "__main__":
    main()
