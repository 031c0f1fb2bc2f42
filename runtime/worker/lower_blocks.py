"""Blocks of a step that lie in the tier below the device: those that it reads, and those that it writes."""

import numpy as np
import numpy.typing as npt
import torch

from sageLLM.runtime.execution_graph.kv_loads import LOAD_FROM, LOAD_INTO, STORE_FROM, STORE_INTO
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.step_inputs import Inputs


def lower_blocks(inputs: Inputs, pool: KVPool) -> dict[str, torch.Tensor]:
    """The inputs of the loads and stores of a step; empty if all its blocks are on the device.

    A block is loaded if it has tokens from before the step, and once if several sequences share it.
    """
    first, size = pool.num_device_blocks, pool.block_size
    table, ends, starts, slots = (_array(inputs, name) for name in ("block_table", "seq_lens", "q_start", "slots"))
    num_old = -(-(ends - np.diff(starts)) // size)
    old = table[:, : num_old.max(initial=0)]
    is_loaded = (np.arange(old.shape[1]) < num_old[:, None]) & (old >= first)
    loaded, written = np.unique(old[is_loaded]), np.unique(slots // size)
    written = written[written >= first]
    if not len(loaded) and not len(written):
        return {}
    columns = {LOAD_FROM: loaded - first, LOAD_INTO: loaded, STORE_FROM: written, STORE_INTO: written - first}
    return {name: torch.from_numpy(column.astype(np.int32)) for name, column in columns.items()}


def _array(inputs: Inputs, name: str) -> npt.NDArray[np.int32]:
    tensor = inputs[name]
    assert tensor is not None, f"every step has {name}"
    array: npt.NDArray[np.int32] = tensor.numpy()
    return array
