"""Messages between ranks of one host, through memory that they share (`point_to_point.cpp`).

The kernels of the ops `send` and `recv` use the same links, so both sides must agree on the order of their messages and
those of `Link`.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sageLLM.generated.ops.comm import Send
from sageLLM.runtime.kernels.cpu.build import build, load, symbol
from sageLLM.runtime.kernels.cpu.compiler import Compiler

SOURCE = Path(__file__).parent / "point_to_point.cpp"
RING_BYTES = 4 * 2**20
"""The bytes that a rank can send to another one before that receives any; a larger message blocks until then."""
HEADER_BYTES = 128  # of a ring: two positions, each with a cache line


@dataclass(slots=True)
class _State:
    compiler: Compiler | None = None
    connected: set[tuple[str, int]] = field(default_factory=set)


_state = _State()


@lru_cache(maxsize=1)
def load_point_to_point(compiler: Compiler | None) -> ctypes.CDLL:
    """The library, loaded once before the kernels that use it, with symbols visible to them. Raises CompileError."""
    return load(build(SOURCE, "f32", compiler), mode=ctypes.RTLD_GLOBAL)


def make_link_memory(num_ranks: int) -> int:
    """The descriptor of new memory for the links of a number of ranks.

    It has no name, and is gone with the last process. Pages of links that are not used are never allocated.
    """
    file = os.memfd_create("sagellm-links", 0)
    os.ftruncate(file, num_ranks**2 * (HEADER_BYTES + RING_BYTES))
    return file


def open_links(file: int, num_ranks: int, compiler: Compiler | None) -> None:
    """Maps the memory of the links. Raises CompileError."""
    opened = symbol(load_point_to_point(compiler), "sage_open_links")
    opened.argtypes = (ctypes.c_int64,) * 3
    opened.restype = ctypes.c_char_p
    _raise_error(opened(file, num_ranks, RING_BYTES))
    _state.compiler = compiler


def connect(group: str, members: Sequence[int | None], own: int) -> None:
    """Connects this process, rank `own` of all, to the members of a group: rank i of the group is `members[i]` of all.

    Members on other hosts are None. A group is one of the choices of the attr `group` of the ops `send` and `recv`. A
    process can belong to several.
    """
    function = symbol(load_point_to_point(_state.compiler), "sage_connect")
    function.argtypes = (ctypes.c_int64,) * 4
    function.restype = ctypes.c_char_p
    for peer, rank in enumerate(members):
        if rank is None:
            continue
        _raise_error(function(group_number(group), peer, own, rank))
        _state.connected.add((group, peer))


def make_pair_memory(ring_bytes: int) -> int:
    """The descriptor of new memory for a link between two processes, with `ring_bytes` in each direction."""
    file = os.memfd_create("sagellm-link", 0)
    os.ftruncate(file, 2 * (HEADER_BYTES + ring_bytes))
    return file


def attach(group: str, peer: int, file: int, side: int, ring_bytes: int, compiler: Compiler | None) -> None:
    """Makes the process with the other end of a pair's memory the rank `peer` of a group, in place of an earlier one.

    The two ends have `side` 0 and 1. Raises CompileError.
    """
    function = symbol(load_point_to_point(compiler), "sage_attach")
    function.argtypes = (ctypes.c_int64,) * 5
    function.restype = ctypes.c_char_p
    _raise_error(function(group_number(group), peer, file, ring_bytes, side))
    _state.compiler = compiler
    _state.connected.add((group, peer))


def break_link(group: str, peer: int) -> None:
    """Lets all waits for a peer end with an error, because the peer is gone; until `attach` connects another one."""
    function = symbol(load_point_to_point(_state.compiler), "sage_break")
    function.argtypes = (ctypes.c_int64,) * 2
    function.restype = None
    function(group_number(group), peer)


def close_links() -> None:
    """Lets `send` and `recv` use torch.distributed again."""
    _state.connected.clear()


def is_connected(group: str, peer: int) -> bool:
    """Whether the kernels of this process can exchange messages with a rank of a group."""
    return (group, peer) in _state.connected


def group_number(group: str) -> int:
    """The number of a group, as the kernels get it."""
    choices = Send.attr_types["group"].choices or ()
    assert group in choices, f"expected one of {choices}, got {group!r}"
    return choices.index(group)


class Link:
    """The messages to and from one rank of a group, as arrays."""

    def __init__(self, group: str, peer: int) -> None:
        assert is_connected(group, peer), f"rank {peer} of the group {group!r} must be connected"
        library = load_point_to_point(_state.compiler)
        self._key = group_number(group), peer
        self._begin_send, self._begin_receive = (
            _function(library, name, ctypes.c_char_p, ctypes.c_int64)
            for name in ("sage_begin_send", "sage_begin_receive")
        )
        self._send, self._receive = (
            _function(library, name, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
            for name in ("sage_send_piece", "sage_receive_piece")
        )

    def send(self, array: npt.NDArray[np.generic]) -> None:
        """Sends a contiguous array; waits only while the ring is full."""
        _raise_error(self._begin_send(*self._key, array.nbytes))
        _raise_error(self._send(*self._key, array.ctypes.data, array.nbytes))

    def receive(self, array: npt.NDArray[np.generic]) -> None:
        """Waits for a message of the size of the contiguous array, and fills the array with it."""
        _raise_error(self._begin_receive(*self._key, array.nbytes))
        _raise_error(self._receive(*self._key, array.ctypes.data, array.nbytes))


def _function(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> "ctypes._NamedFuncPointer":
    function = symbol(library, name)
    function.argtypes = (ctypes.c_int64, ctypes.c_int64, *arguments)
    function.restype = result
    return function  # type: ignore[no-any-return]


def _raise_error(message: bytes | None) -> None:
    if message is not None:
        raise OSError(message.decode())
