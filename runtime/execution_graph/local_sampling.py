"""Sampling from logits that the ranks share: only rows that need all logits are gathered.

logits = linear(x, lm_head)                         logits = linear(x, lm_head)
all = first_features(all_gather(logits))     ->     tokens, best = sample_shard(logits)
tokens = sample(all)                                all = first_features(all_gather(select_rows(logits, full_rows)))
"""

from sageLLM.generated.ops import AllGather, FirstFeatures, Sample, SampleShard, SelectRows
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef

FULL_ROWS = "full_rows"
"""The graph input with the rows of the logits that are gathered, i32[F]."""
(NUM_FULL_ROWS,) = dims("F")


def sample_locally(graph: ExecutionGraph, rank: int, vocab_size: int) -> bool:
    """Rewrites a kernel graph of one rank in place; false if it does not gather logits.

    Its outputs are then the gathered rows f32[F, V], the greedy tokens of all rows, and their logits.
    """
    sample = next((node for node in graph.nodes.values() if isinstance(node, Sample)), None)
    if sample is None:
        return False
    head: list[ExecutionNode] = [sample]
    found = graph.producer(sample.inputs[0])
    while isinstance(found, FirstFeatures | AllGather):
        head.append(found)
        found = graph.producer(found.inputs[0])
    *_, gather = head
    if not isinstance(gather, AllGather):
        return False
    device = gather.device_id
    (logits,), share = gather.inputs, gather.inputs[0].shape[1]
    assert isinstance(share, int), "the vocabulary of a rank has a known size"
    full_rows = graph.inputs[FULL_ROWS] = TensorRef(FULL_ROWS, (NUM_FULL_ROWS,), "i32", device)
    best = TensorRef("best", logits.shape[:1], "f32", device)
    first = min(rank * share, vocab_size)
    attrs = {"first": first, "count": min(share, vocab_size - first), "group": gather.attrs["group"]}
    chosen = SampleShard(
        "sample_shard", SampleShard.kind, [logits], [*sample.outputs, best], device_id=device, attrs=attrs
    )
    wanted = TensorRef("wanted", (NUM_FULL_ROWS, share), logits.dtype, device)
    # The ranks must meet in one collective at a time, and streams order only what depends on each other.
    select = SelectRows(
        "wanted", SelectRows.kind, [logits, full_rows], [wanted], dependencies={chosen.node_id}, device_id=device
    )
    new: list[ExecutionNode] = [chosen, select]
    for node in reversed(head[1:]):
        (old,) = node.outputs
        made = TensorRef(old.name, (NUM_FULL_ROWS, *old.shape[1:]), old.dtype, device)
        attrs = dict(node.attrs)
        new.append(type(node)(node.node_id, node.op_type, [wanted], [made], device_id=device, attrs=attrs))
        wanted = made
    graph.replace(head, new)
    graph.outputs = [wanted, *graph.outputs[1:], best]
    graph.reindex()
    return True
