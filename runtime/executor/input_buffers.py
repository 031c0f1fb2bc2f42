"""Integer inputs of a step in one pinned buffer, and their copy to a device: one asynchronous copy per step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sageLLM.runtime.executor.device_api import DeviceApi, DeviceEvent, Ints

ALIGNMENT = 16
"""Words of 4 bytes that inputs are aligned to: kernels are specialised to pointers that are multiples of 16 bytes."""
MAX_KEPT_PLACES = 256
Shapes = tuple[tuple[str, torch.Size], ...]


@dataclass(slots=True)
class _Memory:
    """Memory of the device, and two buffers of the host, of which one is filled while the other is still copied."""

    device: Tensor
    hosts: list[Tensor]
    copied: list[DeviceEvent]
    turn: int = 0

    def next_turn(self) -> int:
        """The buffer for the next step, after waiting for its last copy, which is seldom necessary."""
        self.turn ^= 1
        if not self.copied[self.turn].query():
            self.copied[self.turn].synchronize()
        return self.turn


@dataclass(slots=True)
class Place:
    """The inputs of steps of the same shapes: `device` are their tensors on the device, at fixed addresses.

    The first ones are `ids`, in all places of a memory; the others begin at `after_ids`.
    """

    memory: _Memory
    num_words: int
    after_ids: int
    device: dict[str, Tensor]
    hosts: list[dict[str, Ints]] = field(default_factory=list)


class InputBuffers:
    """Copies inputs to the device. Only one step at a time may use its copies.

    Memory grows with the largest step; a captured graph keeps the `Place` that it was captured with.
    """

    def __init__(self, api: DeviceApi, num_words: int = 4096) -> None:
        self._api = api
        self._memory = self._allocate(num_words)
        self._places: dict[Shapes, Place] = {}

    def upload(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs on the device; valid until the next upload."""
        place = self.place(inputs)
        self.fill(place, inputs)
        return place.device

    def fill(self, place: Place, inputs: Mapping[str, Tensor], *, keeps_ids: bool = False) -> None:
        """Copies inputs of the shapes of a place to it; with `keeps_ids` all but the token ids, which stay."""
        memory = place.memory
        turn = memory.next_turn()
        arrays = place.hosts[turn]
        for name, x in inputs.items():
            arrays[name][...] = x.numpy()
        copied = slice(place.after_ids if keeps_ids else 0, place.num_words)
        self._api.copy(memory.device[copied], memory.hosts[turn][copied])
        memory.copied[turn].record()

    def place(self, inputs: Mapping[str, Tensor]) -> Place:
        """The place of inputs of these shapes, in memory that is shared with other shapes."""
        shapes = tuple((name, x.shape) for name, x in inputs.items())
        found = self._places.get(shapes)
        if found is None:
            if len(self._places) >= MAX_KEPT_PLACES:
                self._places.clear()
            found = self._places[shapes] = self._new_place(shapes)
        return found

    def _new_place(self, shapes: Shapes) -> Place:
        shapes = tuple(sorted(shapes, key=lambda one: one[0] != "ids"))
        starts, end = [], 0
        for _, shape in shapes:
            starts.append(end)
            end += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
        if end > len(self._memory.device):
            self._memory = self._allocate(max(end, 2 * len(self._memory.device)))
            self._places.clear()

        def views(memory: Tensor) -> dict[str, Tensor]:
            parts = zip(shapes, starts, strict=True)
            return {name: memory[start : start + shape.numel()].view(shape) for (name, shape), start in parts}

        after_ids = starts[1] if len(starts) > 1 and shapes[0][0] == "ids" else 0
        place = Place(self._memory, end, after_ids, views(self._memory.device))
        place.hosts = [{name: x.numpy() for name, x in views(host).items()} for host in self._memory.hosts]
        return place

    def _allocate(self, num_words: int) -> _Memory:
        api = self._api
        hosts = [api.host_ints(num_words) for _ in range(2)]
        return _Memory(api.device_ints(num_words), hosts, [api.new_event() for _ in range(2)])
