"""Packed weights of the CPU's GEMM kernels, made once when a model is loaded; see `packed.h` for the layout."""

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kernels.cpu.library import Library

PANEL, DEPTH = 16, 32
"""Output features per panel, and the multiple that K is padded to, as in `packed.h`."""

LINE, LARGE_PAGE, RESERVE = 64, 2**21, 2**28
"""Sizes in bytes of a cache line, a large page, and a reservation of `WeightMemory`."""
BLOCK = 2**23
"""Bytes of a weight after which `pack_away` returns memory."""

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [gates * N, K], or [groups, gates * N, K]. It has the tensor methods that a kernel call uses.

    A staged weight is valid only in the part of each step that follows its load. A weight of codes has a `form`
    (`coded.py`), bytes as values, the element type `element` for the ops that read it, and `activations`, the type of
    the codes that its products round activations to, if they do.
    """

    values: Tensor
    shape: torch.Size
    gates: int
    is_staged: bool = False
    form: str | None = None
    element: torch.dtype | None = None
    activations: str | None = None

    @property
    def native(self) -> str | None:
        """The name of the form in `Library`, which the kernels are compiled for."""
        return None if self.form is None else native_form(self.form, self.activations)

    @property
    def dtype(self) -> torch.dtype:
        return self.element or self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def stride(self) -> tuple[int, ...]:
        """The strides of a contiguous weight; kernels that read packed weights ignore them."""
        return tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def numel(self) -> int:
        return self.shape.numel()


def native_form(form: str, activations: str | None) -> str:
    """The name of a form of codes, with the type of the activations that they are multiplied with, in `Library`."""
    return form if activations is None else f"{form}_{activations}"


class WeightMemory:
    """Memory for packed weights in large pages, allocated in pieces that are aligned to cache lines.

    Reading a weight page by page of 4 KB takes a sixth longer. What is not handed out is reserved, not used.
    """

    def __init__(self, reserve: int = RESERVE) -> None:
        self._reserve = reserve
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """A piece for `count` elements, which outlives this object."""
        size = count * dtype.itemsize
        if self._used + size > len(self._block):
            self._block, self._used = _large_pages(max(size, self._reserve)), 0
        piece = self._block[self._used : self._used + size].view(dtype)
        self._used += -(-size // LINE) * LINE
        return piece


def release_free_memory() -> None:
    """Returns free pages of the heap to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def release_pages(tensor: Tensor) -> None:
    """Returns the memory of a contiguous CPU tensor to the system, whole pages of it. Its values are lost."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _large_pages(size: int) -> Tensor:
    """At least `size` bytes aligned to a large page, in large pages if the system provides them."""
    memory = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % LARGE_PAGE :]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return memory


def pack(weight: Tensor, gates: int, library: Library, memory: WeightMemory | None = None) -> PackedWeight:
    """A packed copy of the weight, in `memory` if it is to stay. Rows with gaps are made contiguous first."""
    weight = weight if weight.stride(-1) == 1 or weight.shape[-1] <= 1 else weight.contiguous()
    values = _taken(weight, gates, memory)
    _pack_into(values, weight, gates, library)
    return PackedWeight(values, weight.shape, gates)


def pack_away(weight: Tensor, library: Library, memory: WeightMemory) -> PackedWeight:
    """As `pack` of a weight [N, K] without gates. Its memory is returned meanwhile, so that its values are lost.

    So the peak is one copy of the weight and a block, and not two copies; the head is a quarter of some models.
    """
    assert weight.dim() == 2 and weight.is_contiguous()
    values = _taken(weight, 1, memory)
    num_rows = max(1, BLOCK // (weight.stride(0) * weight.itemsize * PANEL)) * PANEL
    for start in range(0, len(weight), num_rows):
        rows = weight[start : start + num_rows]
        _pack_into(values[start * len(values) // _num_features(weight, 1) :], rows, 1, library)
        release_pages(rows)
    return PackedWeight(values, weight.shape, 1)


def _num_features(weight: Tensor, gates: int) -> int:
    """Features with those that fill up the last panel of each gate."""
    return gates * -(-weight.shape[-2] // (gates * PANEL)) * PANEL


def _taken(weight: Tensor, gates: int, memory: WeightMemory | None) -> Tensor:
    """Memory for the packed form of a weight."""
    assert weight.shape[-2] % gates == 0, f"{gates} gates of a weight of {weight.shape[-2]} features"
    groups = weight.shape[0] if weight.dim() == 3 else 1
    memory = memory if memory is not None else WeightMemory(reserve=0)
    return memory.take(groups * _num_features(weight, gates) * -(-weight.shape[-1] // DEPTH) * DEPTH, weight.dtype)


def _pack_into(values: Tensor, weight: Tensor, gates: int, library: Library) -> None:
    groups, group_stride = (weight.shape[0], weight.stride(0)) if weight.dim() == 3 else (1, 0)
    sizes = (groups, gates, weight.shape[-2] // gates, weight.shape[-1], group_stride, weight.stride(-2))
    call(library, "pack", (weight, values), sizes)


def unpack(packed: PackedWeight) -> Tensor:
    """An unpacked copy of the weight, for an op without a kernel that reads it packed. SageError for a staged one."""
    if packed.is_staged:
        raise SageError("weights that each step reads from disk cannot be unpacked; pass kernels='reference'")
    groups = packed.shape[0] if len(packed.shape) == 3 else 1
    features, inner = packed.shape[-2] // packed.gates, packed.shape[-1]
    pair = 2 if packed.dtype == torch.bfloat16 else 1
    depth = -(-inner // DEPTH) * DEPTH
    panels = packed.values.view(groups, -1, packed.gates, depth // pair, PANEL, pair)
    whole = panels.permute(0, 2, 1, 4, 3, 5).reshape(groups, packed.gates, -1, depth)
    return whole[:, :, :features, :inner].reshape(packed.shape)


def unpack_rows(packed: PackedWeight, ids: Tensor, library: Library) -> Tensor:
    """Rows `ids` (int32) of a packed [V, K]."""
    assert packed.gates == 1 and len(packed.shape) == 2, "rows of a weight with gates do not lie in order"
    rows = torch.empty(len(ids), packed.shape[1], dtype=packed.dtype)
    call(library, "unpack_rows", (ids, packed.values, rows), (len(ids), packed.shape[1], packed.shape[1]))
    return rows


def call(library: Library, name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> None:
    """Calls a function of `packing.cpp`, compiled for the element type of the second tensor."""
    function = library.helper("packing.cpp", name, DTYPE_NAMES[tensors[1].dtype])
    pointers = [tensor.data_ptr() for tensor in tensors]
    library.set_num_threads()
    function((ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(sizes))(*sizes), None)


def gates_by_weight(
    nodes: Iterable[OpNode], kernels: Mapping[str, NativeKernel], ties: Mapping[str, str]
) -> dict[str, int]:
    """The weights of GEMMs, each with its gates, for which all consumers agree on the layout.

    `ties` maps tied weights to the weight that they share. A gather reads a table unpacked or packed without gates.
    """
    forms: dict[str, set[int | None]] = {}
    gathered: set[str] = set()
    for node in nodes:
        kernel = kernels.get(node.op)
        for name in node.input_types:
            ref = node.optional_input(name)
            if ref is None:
                continue
            weight = ties.get(ref.name, ref.name)
            if kernel is not None and kernel.unpacks == name:
                gathered.add(weight)
            else:
                forms.setdefault(weight, set()).add(kernel.packed.get(name) if kernel else None)
    agreed = {name: next(iter(found)) for name, found in forms.items() if len(found) == 1}
    return {name: gates for name, gates in agreed.items() if gates == 1 or (gates and name not in gathered)}
