"""Runs the kernels of a generated overlay against its references; prints one JSON line per op, target and type.

    python overlay_runs.py TREE SEED [OP...]

With SAGELLM_EXACT=1, float32 results are also compared with the references in float64. A Triton kernel with a variant
for long rows is run twice, the second time with rows longer than a tile.

The process is separate, because TRITON_INTERPRET must be set before Triton is imported.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("SAGELLM_KERNEL_FLAGS", "-O1")  # half of the compile time; sweeps are vectorised by hand

import torch
from torch import Tensor

from sageLLM.runtime.core.errors import TypeMismatch
from sageLLM.runtime.core.ir.dims import evaluate
from sageLLM.runtime.core.ir.op_node import REQUIRED, OpNode
from sageLLM.runtime.core.ir.types import TensorType, TypePattern
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import DTYPE_NAMES, TORCH_DTYPES, NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.triton_interpreter import patch_interpreter

Kernel = Callable[..., Any]
EXACT = os.environ.get("SAGELLM_EXACT") == "1"
ROWS, COLUMNS = (1, 2, 3), (1, 2, 5, 17, 33)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
EXTREMES = {"i8": (-128, 127), "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1)}
UNDEFINED = ("ZeroDivisionError", "to have non-zero size")
"""Errors of torch: an integer divided by 0, and the largest of no elements."""
SPECIAL = (float("inf"), -float("inf"), float("nan"), 0.0, -0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of one op on one target: "" or the reason why it differs from the reference."""

    op: str
    target: str
    wrong: str


def runs(tree: Path, random: Random, names: list[str]) -> Iterator[Run]:
    """All ops of the tree on all targets that have a kernel for them."""
    sys.path.insert(0, str(tree.parent))
    ops = importlib.import_module(f"{tree.name}.ops").OPS
    references = importlib.import_module(f"{tree.name}.kernels.reference").KERNELS
    found = compiler.find_compiler()
    targets: dict[str, Mapping[str, Kernel]] = {}
    if (tree / "kernels/cpu/__init__.py").exists():
        table = importlib.import_module(f"{tree.name}.kernels.cpu").KERNELS
        library = Library(table, tree / "kernels/cpu", found)
        targets["cpu"] = {name: NativeCallable(one, library, references[name]) for name, one in table.items()}
    if (tree / "kernels/triton/__init__.py").exists():
        targets["triton"] = importlib.import_module(f"{tree.name}.kernels.triton").KERNELS
    for name in names or references:
        cases = list(make_cases(ops[name], random))
        for target in ("reference", "cpu", "triton"):
            kernel = references[name] if target == "reference" else targets.get(target, {}).get(name)
            if kernel is not None:
                yield Run(name, target, why_wrong(ops[name], kernel, references[name], cases))
        if (variant := long_rows(name, targets.get("triton", {}).get(name))) is not None:
            with variant:
                yield Run(name, "long", why_wrong(ops[name], targets["triton"][name], references[name], cases))


def long_rows(name: str, kernel: Kernel | None) -> AbstractContextManager[None] | None:
    """Makes rows longer than a tile: read in blocks by the looped variant, or left to the reference by a selection."""
    module = sys.modules[kernel.__module__] if kernel is not None else None
    if hasattr(module, f"_{name}_long"):
        return replaced(module, "row_tile", half_tile)
    return replaced(module, "LONGEST_TILE", 0) if hasattr(module, f"reference_{name}") else None


def half_tile(columns: int, max_rows: int = 1) -> Any:
    tile = importlib.import_module("sageLLM.generated.kernels.triton.tiles").Tile
    return tile(1, max(1, 2 ** ((columns - 1).bit_length() - 1)), 4, is_looped=True)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def why_wrong(cls: type[OpNode], kernel: Kernel, reference: Kernel, cases: list[Any]) -> str:
    for operands, attrs in cases:
        try:
            expected = as_tuple(reference(*copied(operands), **attrs))
        except Exception as error:
            if any(words in repr(error) for words in UNDEFINED):
                with suppress(RuntimeError, IndexError):  # of a kernel that leaves long rows to the reference
                    kernel(*copied(operands), **attrs)
                continue  # any result, but no crash
            return f"the reference fails: {error!r}"
        try:
            results = as_tuple(kernel(*copied(operands), **attrs))
            types = {name: type_of(x) for name, x in zip(cls.input_types, operands, strict=True) if x is not None}
            inferred = cls.infer(types, attrs)
        except Exception as error:
            return f"{error!r}"[:1500]
        for name, result, oracle in zip(cls.output_types, results, expected, strict=True):
            why = difference(result, oracle, inferred[name])
            if why or (EXACT and (why := inexact(name, cls, reference, operands, attrs, result))):
                shapes = [tuple(x.shape) if x is not None else None for x in operands]
                return f"{name}, {shapes}, {[x.dtype for x in operands if x is not None]}: {why}"
    return ""


def inexact(
    name: str, cls: type[OpNode], reference: Kernel, operands: list[Tensor | None], attrs: Any, result: Tensor
) -> str:
    """The difference of a float32 result from the reference in float64."""
    if result.dtype != torch.float32 or any(x is not None and x.dtype == torch.bfloat16 for x in operands):
        return ""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in operands]
    exact = as_tuple(reference(*wide, **attrs))[list(cls.output_types).index(name)].double()
    finite = exact[exact.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    is_near = torch.allclose(result.double(), exact, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)
    return "" if is_near else f"{result.flatten()[:8].tolist()} is not near {exact.flatten()[:8].tolist()}"


def difference(result: Tensor, oracle: Tensor, inferred: TensorType) -> str:
    if type_of(result) != inferred:
        return f"expected {inferred}, got {type_of(result)}"
    if (result.dtype, result.shape) != (oracle.dtype, oracle.shape):
        return f"expected {oracle.dtype} {tuple(oracle.shape)}, got {result.dtype} {tuple(result.shape)}"
    if not result.is_floating_point():
        return (
            "" if torch.equal(result, oracle) else f"{result.flatten()[:8].tolist()} != {oracle.flatten()[:8].tolist()}"
        )
    a, b = result.double(), oracle.double()
    scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    bound = TOLERANCE[result.dtype]
    if torch.allclose(a, b, rtol=bound, atol=bound * scale, equal_nan=True):
        return ""
    return f"{a.flatten()[:8].tolist()} != {b.flatten()[:8].tolist()}"


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def copied(operands: list[Tensor | None]) -> list[Tensor | None]:
    """Copies that keep the strides."""
    return [x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in operands]


def type_of(x: Tensor) -> TensorType:
    return TensorType(DTYPE_NAMES[x.dtype], tuple(x.shape))


# cases


def make_cases(cls: type[OpNode], random: Random) -> Iterator[tuple[list[Tensor | None], dict[str, Any]]]:
    """Operands and attrs: odd sizes, rows with gaps, absent operands, special values, no rows."""
    for number in range(5):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        sizes = possible_sizes(cls, random)
        if sizes is None:
            return
        if number == 4:
            sizes |= {name: 0 for name in ("T", "R") if name in sizes}
            if not is_possible(cls, sizes):
                return
        attrs = attrs_of(cls, sizes)
        operands = [operand(name, p, sizes, dtype, random, number) for name, p in cls.input_types.items()]
        operands = [None if n in cls.optional_inputs and random.random() < 0.5 else x
                    for n, x in zip(cls.input_types, operands, strict=True)]  # fmt: skip
        layout = {1: spread, 2: transposed}.get(number, lambda x: x)
        yield [layout(x) for x in operands], attrs


def possible_sizes(cls: type[OpNode], random: Random) -> dict[str, Any] | None:
    patterns = [*cls.input_types.values(), *cls.output_types.values()]
    names = sorted({str(s) for p in patterns for d in p.trailing for s in symbols_of(d)} | dim_attrs(cls))
    for _ in range(200):
        sizes = {name: random.choice(ROWS if name in ("T", "N", "K") else COLUMNS) for name in names}
        sizes["R"] = random.choice([[2], [1], [2, 3], []])
        if is_possible(cls, sizes):
            return sizes
    return None


def is_possible(cls: type[OpNode], sizes: Mapping[str, Any]) -> bool:
    try:
        types = {
            name: TensorType("f32" if p.is_variable else p.element, tuple(shape(p, sizes)))
            for name, p in cls.input_types.items()
        }
        cls.resolve(types, attrs_of(cls, sizes))
    except (TypeMismatch, ArithmeticError, ValueError):
        return False
    return True


def symbols_of(dim: Any) -> set[Any]:
    from sageLLM.runtime.core.ir.dims import free_symbols

    return set(free_symbols(dim))


def dim_attrs(cls: type[OpNode]) -> set[str]:
    return {name for name, spec in cls.attr_types.items() if spec.type == "dim"}


def attrs_of(cls: type[OpNode], sizes: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: sizes[name] for name in dim_attrs(cls)}
    values = {"f32": 0.7, "i32": 1, "bool": True, "str": "x"}
    return given | {n: values[s.type] for n, s in cls.attr_types.items() if s.default is REQUIRED and n not in given}


def shape(pattern: TypePattern, sizes: Mapping[str, Any]) -> list[int]:
    env = {name: size for name, size in sizes.items() if name != "R"}
    trailing = [int(str(evaluate(dim, env))) for dim in pattern.trailing]
    leading = sizes["R"] if isinstance(sizes["R"], list) else [sizes["R"]]
    return [*(leading if pattern.has_leading else []), *trailing]


def operand(
    name: str, pattern: TypePattern, sizes: Mapping[str, Any], dtype: torch.dtype, random: Random, number: int
) -> Tensor:
    """Multiples of 1/8 and small integers; in every third case some of the special values of the type."""
    element = DTYPE_NAMES[dtype] if pattern.is_variable else pattern.element
    size = shape(pattern, sizes)
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    if element == "bool":
        return torch.randint(0, 2, size, generator=generator).bool()
    if name.startswith("ids"):  # positions in a table
        return torch.randint(0, 1, size, generator=generator).to(TORCH_DTYPES[element])
    x = torch.randint(-16, 17, size, generator=generator)
    x = x.to(TORCH_DTYPES[element]) / 8 if element not in EXTREMES else x.to(TORCH_DTYPES[element])
    x = x.to(TORCH_DTYPES[element])
    if number == 3 and x.numel():
        for _ in range(1 + x.numel() // 4):
            x.view(-1)[random.randrange(x.numel())] = random.choice(EXTREMES.get(element, SPECIAL))
    return x


def spread(x: Tensor | None) -> Tensor | None:
    """The same values in rows with gaps."""
    if x is None or x.dim() < 1:
        return x
    padded = torch.zeros((*x.shape[:-1], x.shape[-1] + 3), dtype=x.dtype)
    part = padded[..., 1 : 1 + x.shape[-1]]
    part.copy_(x)
    return part


def transposed(x: Tensor | None) -> Tensor | None:
    """The same values with the first dim contiguous, or every second element of a row."""
    if x is None or x.dim() < 1:
        return x
    return x.repeat_interleave(2)[::2] if x.dim() == 1 else x.transpose(0, -1).contiguous().transpose(0, -1)


def main(tree: str, seed: str, *names: str) -> None:
    patch_interpreter()
    torch.manual_seed(0)
    for run in runs(Path(tree), Random(seed), list(names)):
        print(json.dumps(asdict(run)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
