"""Copies KV blocks: within a pool (forks), between the pools of two workers, and between a pool and its tiers.

A copy is a graph of `kv_copy` nodes, one per layer.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kv.copies import BlockCopy, Tier, TierCopy
from sageLLM.runtime.worker.kv_pool import KVPool


class BlockCopies(Protocol):
    """A copy of each `source_blocks[i]` to `target_blocks[i]`."""

    @property
    def source_blocks(self) -> Sequence[int]: ...

    @property
    def target_blocks(self) -> Sequence[int]: ...


class Migrator:
    """Copies KV blocks from one pool to another, or to other blocks of the same one.

    `graph` has the caches of both pools as inputs, under the prefixes `source.` and `target.`.
    """

    def __init__(self, source: KVPool, target: KVPool, graph: ExecutionGraph, kernels: Mapping[str, Kernel]) -> None:
        bound = {f"source.{name}": tensor for name, tensor in source.named_tensors().items()}
        bound |= {f"target.{name}": tensor for name, tensor in target.named_tensors().items()}
        self._plan = Plan(graph, kernels, bound)
        self._device = target.device

    def run(self, copies: Sequence[BlockCopies]) -> None:
        """Makes all these copies in one operation: no block may be both read and written, or written twice."""
        sources = [block for copy in copies for block in copy.source_blocks]
        targets = [block for copy in copies for block in copy.target_blocks]
        self.copy(sources, targets)

    @torch.inference_mode()
    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies block `sources[i]` to block `targets[i]` for all i, in every layer."""
        blocks = torch.tensor([sources, targets], dtype=torch.int32, device=self._device)
        self._plan.run({"src_blocks": blocks[0], "dst_blocks": blocks[1]})


class PoolCopies:
    """Copies between two pools, or within one, of which each may have a lower pool: a Migrator per pair of tiers."""

    def __init__(self, source: KVPool, target: KVPool, graph: ExecutionGraph, kernels: Mapping[str, Kernel]) -> None:
        self._source, self._target, self._graph, self._kernels = source, target, graph, kernels
        self._migrators: dict[tuple[bool, bool], Migrator] = {}

    def run(self, copies: Sequence[BlockCopies]) -> None:
        """As `Migrator.run`."""
        self.copy(
            [block for copy in copies for block in copy.source_blocks],
            [block for copy in copies for block in copy.target_blocks],
        )

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """As `Migrator.copy`."""
        pairs: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
        for source, target in zip(sources, targets, strict=True):
            from_lower, source = _place(self._source, source)
            to_lower, target = _place(self._target, target)
            pairs.setdefault((from_lower, to_lower), []).append((source, target))
        for tiers, blocks in pairs.items():
            self._migrator(*tiers).copy([source for source, _ in blocks], [target for _, target in blocks])

    def _migrator(self, from_lower: bool, to_lower: bool) -> Migrator:
        key = from_lower, to_lower
        if key not in self._migrators:
            source, target = _tier_of(self._source, from_lower), _tier_of(self._target, to_lower)
            self._migrators[key] = Migrator(source, target, self._graph, self._kernels)
        return self._migrators[key]


def _place(pool: KVPool, block: int) -> tuple[bool, int]:
    """Whether a block lies in the lower pool, and its number in its pool."""
    is_lower = pool.lower is not None and block >= pool.num_device_blocks
    return is_lower, block - pool.num_device_blocks if is_lower else block


def _tier_of(pool: KVPool, is_lower: bool) -> KVPool:
    return pool.lower if is_lower and pool.lower is not None else pool


class TieredPool:
    """A worker's pool with its tiers: separate pools in host memory and in files on disk.

    `disk_folder` None means the system's folder for temporary files.
    """

    def __init__(
        self,
        device_pool: KVPool,
        tier_sizes: Mapping[Tier, int],
        compiler: ModelCompiler,
        disk_folder: Path | None = None,
    ) -> None:
        self.pools: dict[Tier, KVPool] = {"device": device_pool}
        for tier, num_blocks in tier_sizes.items():
            if num_blocks:
                folder = Path(disk_folder or tempfile.gettempdir()) if tier == "disk" else None
                self.pools[tier] = device_pool.like(num_blocks, torch.device("cpu"), folder)
        self._compiler = compiler
        self._migrators: dict[tuple[Tier, Tier], PoolCopies] = {}
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-tiers")
        self._pending: Future[None] | None = None
        self._stream = _side_stream(device_pool.device)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Makes copies within the device pool."""
        self._migrator("device", "device").copy([c.source for c in copies], [c.target for c in copies])

    def start(self, copies: Sequence[TierCopy]) -> None:
        """Makes the copies into the device pool, and starts those out of it in the background, until `wait`.

        KV that comes in is decoded in the same step, so its copy is complete on return. Blocks that go out are pinned
        until the step is committed, and no batch of the step reads or writes them, so their copy runs concurrently.
        """
        self.wait()
        outgoing = [copy for copy in copies if copy.source == "device"]
        if outgoing:
            written = None if self._stream is None else torch.cuda.current_stream().record_event()
            self._pending = self._copier.submit(self._copy_in_background, outgoing, written)
        self.copy_tiers([copy for copy in copies if copy.source != "device"])

    def wait(self) -> None:
        """Waits for the background copies, if any. Raises the error of a failed one."""
        if self._pending is not None:
            copies, self._pending = self._pending, None
            copies.result()

    def _copy_in_background(self, copies: Sequence[TierCopy], written: torch.cuda.Event | None) -> None:
        if self._stream is None or written is None:
            self.copy_tiers(copies)
            return
        # The KV to copy may still be in the making on the compute stream: `written` marks the end of that work.
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(written)
            self.copy_tiers(copies)
        self._stream.synchronize()

    def copy_tiers(self, copies: Sequence[TierCopy]) -> None:
        """Makes copies between tiers, with one operation per direction."""
        directions = dict.fromkeys((copy.source, copy.target) for copy in copies)
        for source, target in directions:
            same = [copy for copy in copies if (copy.source, copy.target) == (source, target)]
            self._migrator(source, target).run(same)

    def _migrator(self, source: Tier, target: Tier) -> PoolCopies:
        key = (source, target)
        if key not in self._migrators:
            graph = self._compiler.migrate_graph()
            self._migrators[key] = PoolCopies(self.pools[source], self.pools[target], graph, self._compiler.kernels)
        return self._migrators[key]


def _side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream for copies concurrent with computation; None for devices other than GPUs."""
    if device.type != "cuda":
        return None
    new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    return new_stream(device)
