"""Sampling from logits that the ranks share: the graph finds the greedy tokens, and gathers no logits.

logits = linear(x, lm_head)
all = first_features(all_gather(logits))     ->     logits = linear(x, lm_head)
tokens = sample(all)                                tokens, best = sample_shard(logits)
"""

from sageLLM.generated.ops import AllGather, FirstFeatures, Sample, SampleShard
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef


def sample_locally(graph: ExecutionGraph, rank: int, vocab_size: int) -> bool:
    """Rewrites a kernel graph of one rank in place; false if it does not gather logits.

    Its outputs are then the logits of the rank f32[S, share], the greedy tokens of all rows, and their logits.
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
    (logits,), width = gather.inputs, gather.inputs[0].shape[1]
    assert isinstance(width, int), "the vocabulary of a rank has a known size"
    first, count = share_of(rank, width, vocab_size)
    best = TensorRef("best", logits.shape[:1], "f32", gather.device_id)
    attrs = {"first": first, "count": count, "group": gather.attrs["group"]}
    outputs, device = [*sample.outputs, best], gather.device_id
    chosen = SampleShard("sample_shard", SampleShard.kind, [logits], outputs, device_id=device, attrs=attrs)
    graph.outputs[0] = logits
    graph.replace(head, [chosen])
    graph.outputs.append(best)
    graph.reindex()
    return True


def share_of(rank: int, width: int, vocab_size: int) -> tuple[int, int]:
    """The first token of a rank with logits of `width` tokens, padding included, and their number without padding."""
    first = min(rank * width, vocab_size)
    return first, min(width, vocab_size - first)
