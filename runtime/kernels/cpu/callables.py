"""Native kernels as torch callables: operands by position (None if absent), attrs by keyword, outputs returned."""

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.nodes import AttrValue
from sageLLM.runtime.core.ir.op_node import AttrSpec
from sageLLM.runtime.core.ir.types import TensorType, TypePattern
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.kernels.cpu.library import ELEMENTS, Library, kernel_function
from sageLLM.runtime.kernels.cpu.packing import PackedWeight, pack
from sageLLM.runtime.kernels.kv_codes import declared_shape, form_of

TORCH_DTYPES = {"bool": torch.bool, "i8": torch.int8, "i32": torch.int32, "i64": torch.int64, "f16": torch.float16,
                "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_SIGNATURES = 1024

Kernel = Callable[..., Any]
Operand = Tensor | PackedWeight | None


@dataclass(frozen=True, slots=True)
class Signature:
    """The parts of a call that depend only on shapes, strides and attrs, as ctypes arrays."""

    function: Any
    sizes: Any
    attrs: Any
    copied: tuple[int, ...]  # operands with a layout that the kernel cannot read
    outputs: tuple[tuple[tuple[int, ...], torch.dtype] | int, ...]  # new memory, or the number of the updated operand


class NativeCallable:
    """The kernel of one op. Other element types and devices fall back to the reference."""

    def __init__(self, kernel: NativeKernel, library: Library, reference: Kernel) -> None:
        self.kernel = kernel
        self._library, self._reference = library, reference
        self._signatures: dict[Any, Signature] = {}

    def __call__(self, *operands: Operand, **attrs: Any) -> Any:
        if self.kernel.packed:
            operands = self._packed(operands)
        key = (
            *((type(x), x.shape, x.stride(), x.dtype, x.device) if x is not None else None for x in operands),
            *attrs.items(),
        )
        signature = self._signatures.get(key)
        if signature is None:
            if not self._is_supported(operands):
                return self._reference(*operands, **attrs)
            if len(self._signatures) >= MAX_SIGNATURES:
                self._signatures.clear()
            signature = self._signatures[key] = self._prepared(operands, attrs)
        return self._run(signature, list(operands))

    def _packed(self, operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
        """The operands, with weights that were not packed at load time packed now."""
        if not self._is_supported(operands):
            return operands
        gates = [self.kernel.packed.get(name) for name in self.kernel.op.input_types]
        return tuple(
            pack(x, gate, self._library) if gate is not None and isinstance(x, Tensor) else x
            for gate, x in zip(gates, operands, strict=False)
        )

    def _run(self, signature: Signature, operands: list[Operand]) -> Any:
        for place in signature.copied:
            operand = operands[place]
            operands[place] = operand.contiguous() if isinstance(operand, Tensor) else operand
        outputs = [operands[o] if isinstance(o, int) else torch.empty(o[0], dtype=o[1]) for o in signature.outputs]
        operands += [None] * (len(self.kernel.op.input_types) - len(operands))
        pointers = [x.data_ptr() if x is not None else None for x in (*operands, *outputs)]
        self._library.set_num_threads()
        signature.function((ctypes.c_void_p * len(pointers))(*pointers), signature.sizes, signature.attrs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _is_supported(self, operands: tuple[Operand, ...]) -> bool:
        inputs = list(zip(self.kernel.op.input_types.items(), operands, strict=False))
        caches = [x for (name, _), x in inputs if isinstance(x, Tensor) and name in self.kernel.caches]
        elements = {
            DTYPE_NAMES[x.dtype] for (name, pattern), x in inputs
            if x is not None and pattern.is_variable and not (isinstance(x, Tensor) and self._form(name, x))
        }  # fmt: skip
        return (
            len(elements) <= 1
            and len({form_of(x) for x in caches}) <= 1
            and elements <= set(ELEMENTS)
            and all(x is None or x.device.type == "cpu" for x in operands)
        )

    def _prepared(self, operands: tuple[Operand, ...], attrs: Mapping[str, AttrValue]) -> Signature:
        op = self.kernel.op
        given = {name: x for name, x in zip(op.input_types, operands, strict=False) if x is not None}
        forms = {name: form for name, x in given.items() if isinstance(x, Tensor) and (form := self._form(name, x))}
        known = op.resolve(self._types(given, forms), attrs)
        copied = tuple(
            place for place, (name, x) in enumerate(zip(op.input_types, operands, strict=False))
            if x is not None and row_strides(op.input_types[name], tuple(x.shape), x.stride()) is None
        )  # fmt: skip
        outputs = self._outputs(known.outputs, copied)
        sizes = [int(known.env[name]) for name in self.kernel.sizes]
        for place, (name, pattern) in enumerate(op.input_types.items()):
            sizes += self._strides(pattern, given.get(name), is_copied=place in copied)
        for pattern, output in zip(op.output_types.values(), outputs, strict=True):
            own = operands[output] if isinstance(output, int) else torch.empty(output[0], device="meta")
            sizes += self._strides(pattern, own, is_copied=False)
        numbers = [number(op.attr_types[name], value) for name, value in known.attrs.items() if name in op.attr_types]
        element = self.kernel.element_in(known.env) or ELEMENTS[0]
        unpacks = isinstance(given.get(self.kernel.unpacks or ""), PackedWeight)
        packed = [x for name in self.kernel.packed if isinstance(x := given.get(name), PackedWeight)]
        names = [*(one.native for one in packed), *(one.native for one in forms.values())]
        function = kernel_function(
            self._library.address(op.op, element, unpacks=unpacks, form=names[0] if names else None)
        )
        return Signature(
            function, (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_double * len(numbers))(*numbers), copied, outputs
        )

    def _form(self, name: str, x: Tensor) -> KvForm | None:
        """The form of a cache of codes."""
        return form_of(x) if name in self.kernel.caches else None

    def _types(self, given: Mapping[str, Tensor | PackedWeight], forms: Mapping[str, KvForm]) -> dict[str, TensorType]:
        """The declared types: caches of codes have that of the other operands, or any if there are none."""
        patterns = self.kernel.op.input_types
        plain = (DTYPE_NAMES[x.dtype] for name, x in given.items() if name not in forms and patterns[name].is_variable)
        element = next(plain, ELEMENTS[0])
        return {
            name: TensorType(element, tuple(declared_shape(x))) if name in forms and isinstance(x, Tensor)
            else TensorType(DTYPE_NAMES[x.dtype], tuple(x.shape))
            for name, x in given.items()
        }  # fmt: skip

    def _outputs(
        self, types: tuple[TensorType, ...], copied: tuple[int, ...]
    ) -> tuple[tuple[tuple[int, ...], torch.dtype] | int, ...]:
        op = self.kernel.op
        found: list[tuple[tuple[int, ...], torch.dtype] | int] = []
        for name, type_ in zip(op.output_types, types, strict=True):
            if self.kernel.updates and name in op.inplace:
                place = list(op.input_types).index(op.inplace[name])
                assert place not in copied, f"{op.op} updates {op.inplace[name]!r}, which must have contiguous rows"
                found.append(place)
            else:
                found.append((tuple(map(_whole, type_.shape)), TORCH_DTYPES[type_.dtype]))
        return tuple(found)

    @staticmethod
    def _strides(pattern: TypePattern, x: Operand, *, is_copied: bool) -> list[int]:
        if x is None:
            return [0] * max(len(pattern.dims) - 1, 0)
        own = torch.empty(x.shape, device="meta").stride() if is_copied else x.stride()
        strides = row_strides(pattern, tuple(x.shape), own)
        assert strides is not None, "a contiguous tensor has row strides"
        return strides


def row_strides(pattern: TypePattern, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int] | None:
    """Strides of all declared dims but the last, leading dims as one; None if strides cannot describe the layout."""
    if not shape:
        return []
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    if not pattern.has_leading:
        return list(strides[:-1])
    num_leading = len(shape) - len(pattern.trailing)
    leading = [(size, stride) for size, stride in zip(shape[:num_leading], strides, strict=False) if size != 1]
    for (_, outer), (size, inner) in pairwise(leading):
        if outer != size * inner:
            return None
    rows = [leading[-1][1] if leading else 0] if pattern.trailing else []
    return rows + list(strides[num_leading:-1])


def _whole(dim: Dim) -> int:
    assert isinstance(dim, int), f"the size {dim} of a kernel call must be known"
    return dim


def number(spec: AttrSpec, value: AttrValue) -> float:
    """An attr as a number: NaN for None, the index among its choices for a string."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return float(spec.choices.index(value)) if spec.choices else math.nan
    assert isinstance(value, bool | int | float), f"an attr must be a number or a string, got {value!r}"
    return float(value)
