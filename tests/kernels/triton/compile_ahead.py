"""Compiles Triton kernels for GPUs that need not be present, and prints the resources of each kernel as JSON.

    python compile_ahead.py sm_90:all
    python compile_ahead.py sm_80:linear,rope gfx942:linear
    python compile_ahead.py sm_90:sizes sm_80:sizes=linear      attention, GEMMs and experts at many sizes
    python compile_ahead.py sm_89:few                           the same in bf16, one group of heads for each size
    python compile_ahead.py sm_90:cases                         what `sizes` would compile, by name
    SAGELLM_TREE=FOLDER python compile_ahead.py sm_90:all       the kernels of a generated overlay

The launchers run unchanged, on tensors without data. A stub replaces the driver, so that Triton's JIT specialises the
kernels to their arguments and compiles them; then the launch ends.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sageLLM.generated.kernels.triton.targets import COVERED, why_reference
from sageLLM.runtime.core.ir.dims import evaluate
from sageLLM.runtime.core.ir.op_node import REQUIRED, AttrSpec
from sageLLM.runtime.core.ir.types import TypePattern
from sageLLM.runtime.core.model.kv_form import KV_FORMS, SCALE_BYTES
from sageLLM.runtime.kernels.coded_tensor import CodedTensor, CodeLayout
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES

TREE = Path(os.environ.get("SAGELLM_TREE", "sageLLM/generated"))
sys.path += [str(TREE.parent)] if TREE.is_absolute() else []
PACKAGE = TREE.name if TREE.is_absolute() else "sageLLM.generated"
TABLES = import_module(f"{PACKAGE}.kernels.triton")
KERNELS, TEMPLATES = TABLES.KERNELS, TABLES.TEMPLATES
OPS = import_module(f"{PACKAGE}.ops").OPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WITH_SIZE, REGISTER_COUNT, FRAME_SIZE = 0x04, 0x2F, 0x11
NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
OPCODES = r"\b(HGMMA|HMMA|UTCHMMA|LDG\.E\.128|STG\.E\.128|LDGSTS\.E\.(?:\w+\.)*128)"
DISASSEMBLED = {"_fused_add_rms_norm_rows", "_silu_mul_kernel", "_linear_kernel", "_paged_prefill_attention_kernel"}
DISASSEMBLED |= {"_paged_decode_attention_split", "_paged_prefill_attention_split", "_expert_linear_kernel"}
DISASSEMBLED |= {"_linear_silu_mul_kernel", "_router_logits_kernel", "_expert_down_kernel", "_lm_head_sample_kernel"}
DISASSEMBLED |= {"_varlen_attention_kernel", "_add_rms_norm_linear_kernel", "_add_rms_norm_linear_silu_mul_kernel"}

SIZES = {"R": 32, "T": 32, "B": 32, "S": 32, "H": 4096, "I": 14336, "V": 128256, "P": 8192, "Nq": 32, "Nkv": 8, "N": 32}
SIZES |= {"K": 4096, "D": 128, "Dv": 128, "Dr": 128, "PG": 4096, "BS": 16, "MB": 256, "M": 64, "X": 64, "A": 8}
SIZES |= {"C": 128, "G": 32}
"""Sizes of a model of 8 billion parameters, with experts; rows of LONG do not fit in one tile."""
SIZES |= {"G": 4, "S": 3, "K": 8, "Dr": 64} if PACKAGE != "sageLLM.generated" else {}
LONG = SIZES | {"H": 32768, "I": 32768}

HEAD_SIZES = ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512))
"""Sizes of keys and values; with the last ones, of absorbed latent attention, values are a part of the keys."""
GROUPS = (1, 3, 4, 5, 7, 8, 16, 128)
EXPERT_ROWS = (1, 64, 512, 4096)
"""Rows of experts without a routing table, and with 8, 64 and 512 rows for each expert: tiles of every size."""
CODES = {
    "int8 by output": CodeLayout(8, 128, False, 2**20, "f32", -1, -1, -1, 16, -1),
    "int4 by 128 with zeros": CodeLayout(4, 8, False, 128, "bf16", -1, 64, -1, 96, -1),
    "int4 by 32 with minima": CodeLayout(4, 0, False, 32, "f32", 512, -1, -1, 1024, -1),
    "int6 by 16": CodeLayout(6, 32, False, 16, "f32", -1, -1, -1, 1024, 3072),
    "fp4 by 32": CodeLayout(4, 0, False, 32, "bf16", -1, -1, 256, 320, -1),
    "fp8 by 128": CodeLayout(8, 0, True, 128, "f32", -1, -1, -1, 128, -1),
}
"""Forms of the weights of checkpoints and GGUF files, for rows of 4096 inputs."""
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
TORCH = {"f64": torch.float64, "i8": torch.int8, "bool": torch.bool, "i32": torch.int32, "i64": torch.int64}


class Stub(DriverBase):
    """The part of a driver that the JIT uses before a launch. Kernels are cached by device id: one for each target."""

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
        raise RuntimeError("benchmarking requires a device")


class Case(NamedTuple):
    """One call of a launcher; `label` and `part` name it, and `label` alone if its reference runs."""

    label: str
    op: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.bfloat16
    part: str = ""
    skipped: tuple[str, ...] = ()  # ends of the names of kernels that are not compiled
    codes: str = ""  # the weight's codes, of CODES
    kv_form: str = ""  # the form of KV caches of codes


def cases_of_sizes(ops: Container[str]) -> Iterator[Case]:
    """Attention by head size, element type and group; GEMMs of few and more rows; experts with few and many rows.

    Every head size occurs with every element type and group. The group is a constant of the kernels, which divide
    by it and mask rows with it, so no two groups are the same code, even if their tiles of heads are the same. But the
    kernels that prompts share with decode steps, which differ in the search of a sequence's row, are compiled for the
    two tiles of heads only: of groups up to 16, and above. Latent attention has one key head: its group is the heads
    of a rank.
    """
    for (D, Dv), dtype in product(HEAD_SIZES, DTYPES):
        for name, G in product(("paged_prefill_attention", "paged_decode_attention", "varlen_attention"), GROUPS):
            heads = {"D": D, "Dv": Dv, "Nkv": 1 if D == 576 else 2, "Nq": G if D == 576 else 2 * G}
            if name in ops and (Dv == D or name != "varlen_attention"):
                label = f"{name} {D}{f'/{Dv}' * (Dv != D)} {dtype}"
                skipped = () if G in (4, 128) else ("prefill_attention_split", "prefill_attention_merge")
                yield Case(label, name, SIZES | heads, DTYPES[dtype], f" group {G}", skipped)
    rows = {"linear": (1, 32), "lm_head_sample": (32,)} | dict.fromkeys(("expert_linear", "expert_down"), EXPERT_ROWS)
    rows |= {"add_rms_norm_linear": (16, 32), "add_rms_norm_linear_silu_mul": (16, 32)}
    for name, dtype in product(rows, DTYPES):
        for count in rows[name] if name in ops else ():
            yield Case(f"{name} {count} rows {dtype}", name, SIZES | dict.fromkeys("RST", count), DTYPES[dtype])
    coded = {"linear": (1, 32), "linear_silu_mul": (32,), "lm_head_sample": (32,), "expert_linear": (1, 4096)}
    coded |= {"add_rms_norm_linear_silu_mul": (32,)}
    for name, codes in product(coded, CODES):
        for count in coded[name] if name in ops else ():
            label = f"codes of {codes}, {name} {count} rows bf16"
            yield Case(label, name, SIZES | dict.fromkeys("RST", count), codes=codes)
    for form, name in product(KV_FORMS, ("kv_store", "qk_rope_kv_store", "qk_norm_rope_kv_store")):
        if name in ops:
            yield Case(f"KV of {form}, {name} bf16", name, SIZES, kv_form=form)
    for (D, Dv), form in product(HEAD_SIZES[:4], KV_FORMS):
        for name in ("paged_prefill_attention", "paged_decode_attention"):
            if name in ops:
                heads = {"D": D, "Dv": Dv, "Nkv": 2, "Nq": 8}
                yield Case(f"KV of {form}, {name} {D}{f'/{Dv}' * (Dv != D)} bf16", name, SIZES | heads, kv_form=form)


def compile_op(
    name: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype = torch.bfloat16,
    skipped: tuple[str, ...] = (),
    codes: str = "",
    kv_form: str = "",
) -> dict[str, Any]:
    """The kernels that one call of the op's launcher would run, by name, without those of `skipped`."""
    found: dict[str, Any] = {}
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__name__.endswith(skipped):
            return None
        found[self.fn.__name__] = kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        return kernel

    JITFunction.run = record
    try:
        KERNELS[name](*operands(name, sizes, dtype, codes, kv_form), **attrs(name, sizes))
    finally:
        JITFunction.run = original
    return found


def operands(
    name: str, sizes: Mapping[str, int], dtype: torch.dtype, codes: str = "", kv_form: str = ""
) -> list[torch.Tensor | None]:
    """Tensors without data; of the optional operands only weights and biases."""
    op = OPS[name]
    absent = op.optional_inputs - {"w", "bias"}
    made = {key: None if key in absent else operand(pattern, sizes, dtype) for key, pattern in op.input_types.items()}
    if "k_cache" in made and sizes["D"] == 576:
        made["v_cache"] = made["k_cache"][..., : sizes["Dv"]]
    if codes:
        weight = TABLES.CODED[name]
        rows = torch.empty(*made[weight].shape[:-1], 8192, dtype=torch.uint8, device="meta")
        made[weight] = CodedTensor(made[weight].shape, dtype, rows, CODES[codes], codes)
    for cache in ("k_cache", "v_cache") if kv_form else ():
        *outer, width = made[cache].shape
        kind = TORCH_TYPES[KV_FORMS[kv_form]]
        made[cache] = torch.empty(*outer, width + SCALE_BYTES, dtype=kind, device="meta")
    return [*made.values()]


def operand(pattern: TypePattern, sizes: Mapping[str, int], dtype: torch.dtype) -> Any:
    leading = [sizes["R"]] if pattern.has_leading else []
    shape = [*leading, *(int(str(evaluate(dim, sizes))) for dim in pattern.trailing)]
    if pattern.is_variable or pattern.element == "f32":
        return torch.empty(shape, dtype=dtype if pattern.is_variable else torch.float32, device="meta")
    return torch.zeros(shape, dtype=TORCH[pattern.element])  # launchers read the values of integer operands


def attrs(name: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    def value(key: str, spec: AttrSpec) -> Any:
        if spec.type == "dim":
            return sizes[key]
        if callable(spec.default):
            return spec.default(sizes)
        return 1.0 if spec.default is REQUIRED else spec.default

    return {key: value(key, spec) for key, spec in OPS[name].attr_types.items()}


def needs(name: str, kernel: Any, target: GPUTarget) -> dict[str, Any]:
    """Registers per thread, spills (a count on AMD, bytes on NVIDIA), bytes of shared memory, opcodes.

    On AMD also whether some loads have 16 bytes, which the files do not record.
    """
    if target.backend == "hip":
        found = amd_needs(kernel.asm["amdgcn"])
    else:
        found = nvidia_needs(kernel.asm["cubin"])
        found["opcodes"] = opcodes(kernel.asm["cubin"]) if name in DISASSEMBLED else []
    return {**found, "shared": kernel.metadata.shared}


def nvidia_needs(cubin: bytes) -> dict[str, Any]:
    """Reads the section .nv.info of the ELF file: attributes of 4 bytes, or of 4 + size bytes if they have a size."""
    at, size, count = struct.unpack_from("<Q10xHH", cubin, 0x28)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + number * size) for number in range(count)]
    names = sections[struct.unpack_from("<H", cubin, 0x3E)[0]][4]
    [info] = [one for one in sections if cubin[names + one[0] :].startswith(b".nv.info\0")]
    at, end = info[4], info[4] + info[5]
    found = {REGISTER_COUNT: 0, FRAME_SIZE: 0}
    while at < end:
        form, kind, size = struct.unpack_from("<BBH", cubin, at)
        if form == WITH_SIZE and kind in found:
            found[kind] = max(found[kind], struct.unpack_from("<I", cubin, at + 8)[0])
        at += 4 + (size if form == WITH_SIZE else 0)
    return {"registers": found[REGISTER_COUNT], "spilled": found[FRAME_SIZE]}


def opcodes(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([NVDISASM, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(OPCODES, code)))


def amd_needs(assembly: str) -> dict[str, Any]:
    registers, spilled = (
        int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0]) for key in ("vgpr_count", "vgpr_spill_count")
    )
    found = {"registers": registers, "spilled": spilled, "opcodes": ["MFMA"] if "v_mfma" in assembly else []}
    return {**found, "loads_16_bytes": "load_dwordx4" in assembly}


def size_needs(target: str, cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """The needs at many sizes by label and kernel, or the reason why the reference runs by label."""
    return dict(pair for case in cases for pair in case_needs(target, case))


def case_needs(target: str, case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    if reason := why_reference_of(case, target):
        yield case.label, {"reference": reason}
        return
    for name, kernel in compile_op(case.op, case.sizes, case.dtype, case.skipped, case.codes, case.kv_form).items():
        own = name.removeprefix(f"_{case.op}_")
        yield f"{case.label}{case.part} {own}", needs(name, kernel, TARGETS[target])


def few_cases() -> Iterator[Case]:
    """The cases in bf16, of attention those with groups of 4."""
    cases = (case for case in cases_of_sizes(KERNELS) if case.dtype == torch.bfloat16)
    return (case for case in cases if case.part in ("", " group 4"))


def why_reference_of(case: Case, target: str) -> str | None:
    if case.op not in TEMPLATES:
        return None
    sizes = {"E": case.dtype.itemsize, **{name: case.sizes[name] for name in ("D", "Dv") if "attention" in case.op}}
    return why_reference(COVERED.get(target, target), TEMPLATES[case.op], sizes)


def report_of(target: str, ops: str) -> dict[str, dict[str, Any]]:
    """What one request asks for, by the names of kernels or cases."""
    if ops == "cases":
        return {
            f"{case.label}{case.part}": {} for case in cases_of_sizes(KERNELS) if not why_reference_of(case, target)
        }
    if ops == "few":
        return size_needs(target, few_cases())
    if ops.startswith("sizes"):
        return size_needs(target, cases_of_sizes(ops.split("=")[1].split(",") if "=" in ops else KERNELS))
    found: dict[str, dict[str, Any]] = {}
    names = [*KERNELS] if ops == "all" else ops.split(",")
    for name, sizes in ((name, sizes) for name in names for sizes in (SIZES, LONG)):
        for kernel_name, kernel in compile_op(name, sizes).items():
            if kernel_name not in found:
                found[kernel_name] = needs(kernel_name, kernel, TARGETS[target])
    return found


def main(requests: list[str]) -> None:
    """Each request is a target and its ops, or all of them, as in sm_80:linear,rope."""
    report: dict[str, dict[str, Any]] = {}
    for device, (target, ops) in enumerate(request.split(":") for request in requests):
        driver.set_active(Stub(TARGETS[target], device))
        report.setdefault(target, {}).update(report_of(target, ops))
    json.dump({"triton": triton.__version__, "targets": report}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
