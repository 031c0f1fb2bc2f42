"""Acceptance tests of the execution graph: its types, the builder for each kind of step, and the default passes."""

from dataclasses import MISSING, fields, replace
from itertools import pairwise

import pytest

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.execution_graph.builder import (
    DecodeBatch,
    ExecutionGraphBuilder,
    ModelConfig,
    ParallelConfig,
    PrefillBatch,
)
from sageLLM.runtime.execution_graph.ir import CycleError, ExecutionGraph, ExecutionNode, OpType, TensorRef
from sageLLM.runtime.execution_graph.optimizer import (
    CommunicationFusionPass,
    ComputeCommOverlapPass,
    GraphOptimizer,
    KVPrefetchPass,
    MemoryOptimizationPass,
    OptimizationPass,
)

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_kv_heads=4,
    intermediate_size=96,
    vocab_size=128,
    max_seq_len=512,
)
PREFILL = PrefillBatch(request_ids=["a", "b"], input_lengths=[10, 22], total_tokens=32)
DECODE = DecodeBatch(request_ids=["c", "d", "e"], context_lengths=[5, 17, 100], batch_size=3)


@pytest.fixture
def builder() -> ExecutionGraphBuilder:
    return ExecutionGraphBuilder(MODEL, ParallelConfig())


def node(name: str, *needs: str, time: float = 1.0, device: int = 0, stream: int = 0) -> ExecutionNode:
    """A node that reads the outputs of `needs` and writes a value with the node's name."""
    inputs = [TensorRef(need, (2, 3), "f32") for need in needs]
    return ExecutionNode(
        node_id=name,
        op_type=OpType.FFN,
        inputs=inputs,
        outputs=[TensorRef(name, (2, 3), "f32")],
        dependencies=set(needs),
        device_id=device,
        stream_id=stream,
        estimated_time_us=time,
    )


def graph_of(*nodes: ExecutionNode) -> ExecutionGraph:
    graph = ExecutionGraph("test")
    for each in nodes:
        graph.add_node(each)
    return graph


def ops(graph: ExecutionGraph, kind: OpType) -> list[ExecutionNode]:
    return [each for each in graph.nodes.values() if each.op_type is kind]


class TestTypes:
    def test_op_types_of_the_original_interface_come_first_in_order(self) -> None:
        names = [kind.name for kind in OpType]
        assert names[:6] == ["PREFILL_ATTN", "DECODE_ATTN", "FFN", "EMBEDDING", "LM_HEAD", "LAYERNORM"]
        assert names[6:10] == ["COMM_ALLREDUCE", "COMM_ALLGATHER", "COMM_SEND", "COMM_RECV"]
        assert names[10:13] == ["KV_LOAD", "KV_STORE", "KV_MIGRATE"]

    def test_tensor_ref(self) -> None:
        ref = TensorRef("x", (2, 3), "bf16")
        assert (ref.device_id, ref.num_elements, ref.num_bytes) == (0, 6, 12)
        assert TensorRef("x", (2, 3), "bf16", 1) != ref

    def test_node_has_the_original_fields_and_defaults(self) -> None:
        names = [field.name for field in fields(ExecutionNode)]
        assert names[:11] == [
            "node_id", "op_type", "inputs", "outputs", "dependencies", "device_id", "stream_id",
            "estimated_time_us", "memory_bytes", "layer_id", "metadata",
        ]  # fmt: skip
        made = ExecutionNode("n", OpType.FFN, [], [])
        assert (made.dependencies, made.device_id, made.stream_id, made.metadata) == (set(), 0, 0, {})
        assert (made.estimated_time_us, made.memory_bytes, made.layer_id) == (0.0, 0, None)

    def test_graph_has_the_original_fields_and_defaults(self) -> None:
        names = [field.name for field in fields(ExecutionGraph)]
        assert names[:7] == [
            "graph_id", "nodes", "prefill_nodes", "decode_nodes", "comm_nodes", "num_layers", "model_config",
        ]  # fmt: skip
        graph = ExecutionGraph("g")
        assert (graph.nodes, graph.prefill_nodes, graph.decode_nodes, graph.comm_nodes) == ({}, set(), set(), set())
        assert (graph.num_layers, graph.model_config) == (0, None)

    def test_configs_and_batches(self) -> None:
        required = [field.name for field in fields(ModelConfig) if field.default is MISSING]
        assert required == [
            "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "intermediate_size", "vocab_size",
        ]  # fmt: skip
        assert ModelConfig(1, 2, 3, 4, 5, 6).max_seq_len == 4096
        assert ParallelConfig() == ParallelConfig(1, 1, 1)
        assert [field.name for field in fields(PrefillBatch)] == ["request_ids", "input_lengths", "total_tokens"]
        assert [field.name for field in fields(DecodeBatch)] == ["request_ids", "context_lengths", "batch_size"]


class TestGraph:
    def test_add_node_keeps_membership(self) -> None:
        graph = graph_of(node("a"))
        reduce_ = ExecutionNode("r", OpType.COMM_ALLREDUCE, [TensorRef("a", (2, 3), "f32")], [])
        graph.add_node(reduce_)
        assert graph.comm_nodes == {"r"}
        assert reduce_.dependencies == {"a"}
        with pytest.raises(ValueError, match="graph 'test' already has a node 'a'"):
            graph.add_node(node("a"))

    def test_add_edge(self) -> None:
        graph = graph_of(node("a"), node("b"))
        graph.add_edge("b", "a")
        assert graph.nodes["a"].dependencies == {"b"}
        with pytest.raises(ValueError, match="unknown node 'z' in graph 'test'"):
            graph.add_edge("a", "z")

    def test_topological_sort(self) -> None:
        graph = graph_of(node("d", "b", "c"), node("b", "a"), node("c", "a"), node("a"))
        assert [each.node_id for each in graph.topological_sort()] == ["a", "b", "c", "d"]

    def test_a_cycle_is_named_in_order(self) -> None:
        graph = graph_of(node("a"), node("b", "a"), node("c", "b"))
        graph.add_edge("c", "a")
        with pytest.raises(CycleError, match="dependency cycle: a -> b -> c -> a"):
            graph.topological_sort()

    def test_critical_path_is_the_longest_chain(self) -> None:
        graph = graph_of(node("a", time=1), node("b", "a", time=5), node("c", "a", time=2), node("d", "b", "c", time=1))
        assert [each.node_id for each in graph.get_critical_path()] == ["a", "b", "d"]
        assert ExecutionGraph("empty").get_critical_path() == []

    def test_total_time_respects_streams_and_devices(self) -> None:
        def total(**second: int) -> float:
            return graph_of(node("a", time=3), node("b", time=4, **second)).estimate_total_time()

        assert total() == 7
        assert total(stream=1) == 4
        assert total(device=1) == 4
        assert graph_of(node("a", time=3), node("b", "a", time=4, stream=1)).estimate_total_time() == 7

    def test_subgraph_leaves_the_original_alone(self) -> None:
        graph = graph_of(node("a"), node("b", "a"), node("c", "b"))
        part = graph.get_subgraph({"b", "c"})
        assert list(part.nodes) == ["b", "c"]
        assert part.nodes["b"].dependencies == set()
        part.nodes["c"].metadata["seen"] = True
        assert graph.nodes["b"].dependencies == {"a"}
        assert graph.nodes["c"].metadata == {}


class TestPrefill:
    def test_graph(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_prefill_graph(PREFILL)
        verify(graph)
        assert (graph.graph_id, graph.num_layers, graph.model_config) == ("prefill_32", 4, MODEL)
        assert graph.prefill_nodes == set(graph.nodes)
        assert graph.decode_nodes == graph.comm_nodes == set()
        for kind in (OpType.PREFILL_ATTN, OpType.FFN, OpType.KV_STORE):
            assert [each.layer_id for each in ops(graph, kind)] == [0, 1, 2, 3]
        for kind in (OpType.EMBEDDING, OpType.LM_HEAD, OpType.SAMPLE):
            assert len(ops(graph, kind)) == 1
        assert ops(graph, OpType.DECODE_ATTN) == ops(graph, OpType.KV_LOAD) == []

    def test_it_stores_the_keys_and_values_of_all_tokens(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_prefill_graph(PREFILL)
        for store in ops(graph, OpType.KV_STORE):
            made = next(ref for ref in store.inputs if ref.name.endswith("kv_new"))
            assert made.shape == (32, 2, 4, 8)
            producer = graph.producer(made)
            assert producer is not None
            assert producer.op_type is OpType.PREFILL_ATTN

    def test_shapes_are_concrete_and_logits_are_of_the_last_rows(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_prefill_graph(PREFILL)
        refs = [ref for each in graph.nodes.values() for ref in (*each.inputs, *each.outputs)]
        assert all(isinstance(size, int) for ref in refs for size in ref.shape)
        assert [(ref.shape, ref.dtype) for ref in graph.outputs] == [((2, 128), "f32"), ((2,), "i64")]

    def test_times_and_bytes_are_estimated(self, builder: ExecutionGraphBuilder) -> None:
        small = builder.build_prefill_graph(PREFILL)
        large = builder.build_prefill_graph(PrefillBatch(["a", "b"], [400, 500], 900))
        assert all(each.estimated_time_us > 0 for each in small.nodes.values())
        assert all(each.memory_bytes == sum(ref.num_bytes for ref in each.outputs) for each in small.nodes.values())
        assert 0 < small.estimate_total_time() < large.estimate_total_time()

    def test_hardware_decides_the_times(self) -> None:
        batch = PrefillBatch(["a"], [512], 512)
        cpu = ExecutionGraphBuilder(MODEL, hardware=HARDWARE["cpu"]).build_prefill_graph(batch)
        gpu = ExecutionGraphBuilder(MODEL, hardware=HARDWARE["h100"]).build_prefill_graph(batch)
        assert gpu.estimate_total_time() < cpu.estimate_total_time()


class TestDecode:
    def test_graph(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_decode_graph(DECODE)
        verify(graph)
        assert graph.graph_id == "decode_3"
        assert graph.decode_nodes == set(graph.nodes)
        assert graph.prefill_nodes == set()
        for kind in (OpType.KV_LOAD, OpType.DECODE_ATTN, OpType.FFN):
            assert [each.layer_id for each in ops(graph, kind)] == [0, 1, 2, 3]
        assert ops(graph, OpType.PREFILL_ATTN) == ops(graph, OpType.KV_STORE) == []
        assert graph.topological_sort()[-1].op_type is OpType.SAMPLE

    def test_attention_reads_the_loaded_context(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_decode_graph(DECODE)
        for attention in ops(graph, OpType.DECODE_ATTN):
            load = next(graph.nodes[d] for d in attention.dependencies if graph.nodes[d].op_type is OpType.KV_LOAD)
            assert load.outputs[0] in attention.inputs
            assert load.outputs[0].shape == (5 + 17 + 100, 2, 4, 8)
            assert load.layer_id == attention.layer_id

    def test_longer_contexts_take_longer(self, builder: ExecutionGraphBuilder) -> None:
        short = builder.build_decode_graph(DECODE).nodes["L0.a"]
        long = builder.build_decode_graph(DecodeBatch(["c", "d", "e"], [500, 500, 500], 3)).nodes["L0.a"]
        assert short.estimated_time_us < long.estimated_time_us


class TestHybrid:
    def test_graph(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_hybrid_graph(PREFILL, DECODE)
        verify(graph)
        assert graph.graph_id == "hybrid_32_3"
        prefills, decodes = ops(graph, OpType.PREFILL_ATTN), ops(graph, OpType.DECODE_ATTN)
        assert [each.layer_id for each in prefills] == [each.layer_id for each in decodes] == [0, 1, 2, 3]
        assert {each.node_id for each in prefills} <= graph.prefill_nodes - graph.decode_nodes
        assert {each.node_id for each in decodes} <= graph.decode_nodes - graph.prefill_nodes
        assert {each.node_id for each in ops(graph, OpType.FFN)} <= graph.prefill_nodes & graph.decode_nodes
        assert graph.outputs[1].shape == (5,)

    def test_each_half_has_its_rows_and_the_time_of_its_own_step(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_hybrid_graph(PREFILL, DECODE)
        prefill, decode = graph.nodes["L0.a_prefill"], graph.nodes["L0.a_decode"]
        assert (prefill.outputs[0].shape, decode.outputs[0].shape) == ((32, 64), (3, 64))
        assert graph.nodes["L0.a"].outputs[0].shape == (35, 64)
        alone = builder.build_prefill_graph(PREFILL).nodes["L0.a"], builder.build_decode_graph(DECODE).nodes["L0.a"]
        assert prefill.estimated_time_us == alone[0].estimated_time_us
        assert decode.estimated_time_us == alone[1].estimated_time_us


class TestParallel:
    def test_tensor_parallel_layers_reduce_twice(self) -> None:
        graph = ExecutionGraphBuilder(MODEL, ParallelConfig(tensor_parallel_size=2)).build_prefill_graph(PREFILL)
        verify(graph)
        reduced = [each.layer_id for each in ops(graph, OpType.COMM_ALLREDUCE)]
        assert reduced == [None, 0, 0, 1, 1, 2, 2, 3, 3]
        assert len(ops(graph, OpType.COMM_ALLGATHER)) == 1
        assert graph.comm_nodes == {each.node_id for each in graph.nodes.values() if each.op_type.is_comm}
        assert graph.weights["embed"].shape == (64, 64)

    def test_pipeline_stages_have_their_devices_and_send_at_the_borders(self) -> None:
        graph = ExecutionGraphBuilder(MODEL, ParallelConfig(pipeline_parallel_size=2)).build_decode_graph(DECODE)
        verify(graph)
        by_layer = {each.layer_id: each.device_id for each in ops(graph, OpType.FFN)}
        assert by_layer == {0: 0, 1: 0, 2: 1, 3: 1}
        (send,), (receive,) = ops(graph, OpType.COMM_SEND), ops(graph, OpType.COMM_RECV)
        assert (send.device_id, receive.device_id) == (0, 1)
        assert receive.inputs == send.outputs
        assert graph.nodes["x"].device_id == 0
        assert graph.nodes["tokens"].device_id == 1

    def test_every_value_is_read_on_the_device_that_has_it(self) -> None:
        parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=4)
        graph = ExecutionGraphBuilder(MODEL, parallel).build_hybrid_graph(PREFILL, DECODE)
        assert len(ops(graph, OpType.COMM_SEND)) == 3
        for each in graph.nodes.values():
            if each.op_type is not OpType.COMM_RECV:
                assert {ref.device_id for ref in each.inputs} <= {each.device_id}

    def test_data_parallel_copies_do_not_show_in_the_graph(self, builder: ExecutionGraphBuilder) -> None:
        copies = ExecutionGraphBuilder(MODEL, ParallelConfig(data_parallel_size=8)).build_decode_graph(DECODE)
        assert copies == builder.build_decode_graph(DECODE)

    def test_every_layout_builds(self) -> None:
        graph = ExecutionGraphBuilder(MODEL, ParallelConfig(2, 2), layout="qwen3").build_hybrid_graph(PREFILL, DECODE)
        verify(graph)


class TestSingleNodes:
    def test_attention_and_ffn_are_those_of_the_graph(self, builder: ExecutionGraphBuilder) -> None:
        prefill, decode = builder.build_prefill_graph(PREFILL), builder.build_decode_graph(DECODE)
        assert builder._build_attention_node(1, True, PREFILL) == prefill.nodes["L1.a"]
        assert builder._build_attention_node(2, False, DECODE) == decode.nodes["L2.a"]
        assert builder._build_ffn_node(3, PREFILL) == prefill.nodes["L3.f"]
        assert builder._build_ffn_node(0, DECODE) == decode.nodes["L0.f"]

    def test_comm_node(self) -> None:
        builder = ExecutionGraphBuilder(MODEL, ParallelConfig(2, 2))
        reduce_ = builder._build_comm_node(1, OpType.COMM_ALLREDUCE)
        assert (reduce_.op_type, reduce_.layer_id, reduce_.attrs["group"]) == (OpType.COMM_ALLREDUCE, 1, "tp")
        assert builder._build_comm_node(1, OpType.COMM_SEND).attrs == {"peer": 1, "group": "pp"}

    def test_missing_nodes_are_errors(self, builder: ExecutionGraphBuilder) -> None:
        with pytest.raises(ValueError, match=r"layer_id must be 0 to 3, got 4"):
            builder._build_ffn_node(4, PREFILL)
        with pytest.raises(ValueError, match="is_prefill=True: expected a PrefillBatch, got a DecodeBatch"):
            builder._build_attention_node(0, True, DECODE)
        with pytest.raises(ValueError, match="expected a COMM_ op type, got FFN"):
            builder._build_comm_node(0, OpType.FFN)
        message = "expected a COMM_ALLREDUCE node in layer 0, got none with tensor_parallel_size=1"
        with pytest.raises(ValueError, match=message):
            builder._build_comm_node(0, OpType.COMM_ALLREDUCE)


class TestBadInput:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (
                PrefillBatch([], [], 0),
                "prefill batch: input_lengths: expected at least one request, got an empty batch",
            ),
            (
                PrefillBatch(["a"], [1, 2], 3),
                "prefill batch: input_lengths: expected one length per request, got 2 for 1",
            ),
            (PrefillBatch(["a"], [-3], -3), "prefill batch: input_lengths[0] must be 1 to max_seq_len=512, got -3"),
            (
                PrefillBatch(["a"], [513], 513),
                "prefill batch: input_lengths[0] must be 1 to max_seq_len=512, got 513",
            ),
            (PrefillBatch(["a"], [4], 5), "prefill batch: total_tokens must be 4, the sum of input_lengths, got 5"),
        ],
    )
    def test_prefill(self, builder: ExecutionGraphBuilder, batch: PrefillBatch, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            builder.build_prefill_graph(batch)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (
                DecodeBatch([], [], 0),
                "decode batch: context_lengths: expected at least one request, got an empty batch",
            ),
            (DecodeBatch(["a"], [4], 2), "decode batch: batch_size must be 1, the number of request_ids, got 2"),
            (DecodeBatch(["a"], [0], 1), "decode batch: context_lengths[0] must be 1 to max_seq_len=512, got 0"),
        ],
    )
    def test_decode(self, builder: ExecutionGraphBuilder, batch: DecodeBatch, message: str) -> None:
        for build in (builder.build_decode_graph, lambda bad: builder.build_hybrid_graph(PREFILL, bad)):
            with pytest.raises(ValueError) as caught:
                build(batch)
            assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("parallel", "message"),
        [
            ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
            (
                {"tensor_parallel_size": 3},
                "tensor_parallel_size=3 does not divide num_attention_heads=8; use a divisor of 8",
            ),
            (
                {"pipeline_parallel_size": 5},
                "pipeline_parallel_size=5 is more than the 4 layers of llama; use at most one stage per layer",
            ),
        ],
    )
    def test_degrees(self, parallel: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            ExecutionGraphBuilder(MODEL, ParallelConfig(**parallel)).build_prefill_graph(PREFILL)
        assert str(caught.value) == message

    def test_a_vocabulary_that_is_not_divided_is_padded(self) -> None:
        """Each rank has 64 of 128 rows for 101 tokens, and the logits of the padding are cut off."""
        builder = ExecutionGraphBuilder(replace(MODEL, vocab_size=101), ParallelConfig(tensor_parallel_size=2))
        graph = builder.build_hybrid_graph(PREFILL, DECODE)
        verify(graph)
        assert graph.weights["lm_head"].shape == (64, 64)
        (gathered,) = ops(graph, OpType.COMM_ALLGATHER)
        assert gathered.outputs[0].shape == (5, 128)
        assert graph.nodes["tokens"].inputs[0].shape == (5, 101)

    def test_unknown_layout(self) -> None:
        with pytest.raises(ValueError, match=r"^unknown layout 'gpt5'; known are .*\bllama, .*\bqwen3\b"):
            ExecutionGraphBuilder(MODEL, layout="gpt5")

    def test_sizes_that_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="ModelConfig: 'num_hidden_layers': expected a size of 1 to"):
            ExecutionGraphBuilder(ModelConfig(0, 64, 8, 4, 96, 128))


class TestDefaultPasses:
    def test_names_and_order(self) -> None:
        passes = GraphOptimizer().passes
        assert [each.name for each in passes] == ["comm_fusion", "compute_comm_overlap", "kv_prefetch", "memory_opt"]
        kinds = [CommunicationFusionPass, ComputeCommOverlapPass, KVPrefetchPass, MemoryOptimizationPass]
        for each, kind in zip(passes, kinds, strict=True):
            assert isinstance(each, kind)
            assert isinstance(each, OptimizationPass)

    def test_an_own_pass_is_run_last(self, builder: ExecutionGraphBuilder) -> None:
        class MarkPass(OptimizationPass):
            """Notes on every node that it was there."""

            @property
            def name(self) -> str:
                return "mark"

            def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
                for each in graph.nodes.values():
                    each.metadata["marked"] = True
                return graph

        optimizer = GraphOptimizer([])
        optimizer.add_pass(MarkPass())
        done = optimizer.optimize(builder.build_decode_graph(DECODE))
        assert all(each.metadata["marked"] for each in done.nodes.values())

    def test_communication_fusion_merges_small_independent_all_reduces(self) -> None:
        def reduce_(name: str) -> ExecutionNode:
            source, result = TensorRef(f"in_{name}", (2, 3), "f32"), TensorRef(name, (2, 3), "f32")
            return ExecutionNode(name, OpType.COMM_ALLREDUCE, [source], [result], attrs={"group": "tp"})

        graph = graph_of(reduce_("r1"), reduce_("r2"), node("use", "r1", "r2"))
        graph.inputs = {f"in_{name}": TensorRef(f"in_{name}", (2, 3), "f32") for name in ("r1", "r2")}
        fused = CommunicationFusionPass().apply(graph)
        assert len(ops(fused, OpType.COMM_ALLREDUCE)) == 1
        assert len(fused.comm_nodes) == 1

    def test_overlap_moves_communication_to_a_separate_stream(self) -> None:
        graph = ExecutionGraphBuilder(MODEL, ParallelConfig(tensor_parallel_size=2)).build_prefill_graph(PREFILL)
        before = graph.estimate_total_time()
        done = ComputeCommOverlapPass().apply(graph)
        verify(done)
        comm = {done.nodes[node_id].stream_id for node_id in done.comm_nodes}
        compute = {
            each.stream_id for each in done.nodes.values() if not each.op_type.is_comm and not each.op_type.is_kv
        }
        assert comm.isdisjoint(compute)
        assert done.estimate_total_time() <= before

    def test_prefetch_loads_the_next_layer_while_this_one_computes(self, builder: ExecutionGraphBuilder) -> None:
        graph = builder.build_decode_graph(DECODE)
        for load in ops(graph, OpType.KV_LOAD):
            load.metadata["tier"] = "host"
            load.estimated_time_us = 5.0
        before = graph.estimate_total_time()
        done = KVPrefetchPass().apply(graph)
        verify(done)
        assert done.estimate_total_time() < before

    def test_memory_optimization_reuses_memory(self, builder: ExecutionGraphBuilder) -> None:
        pass_ = MemoryOptimizationPass()
        verify(pass_.apply(builder.build_prefill_graph(PREFILL)))
        plan = pass_.plan
        assert plan.max_live_bytes <= plan.peak_bytes < plan.total_bytes
        placed = list(zip(plan.buffers, plan.offsets, strict=True))
        for i, (one, at) in enumerate(placed):
            for other, there in placed[:i]:
                assert not one.interferes_with(other) or at + one.size <= there or there + other.size <= at

    def test_all_four_keep_the_graph_right_and_make_it_no_slower(self) -> None:
        builder = ExecutionGraphBuilder(MODEL, ParallelConfig(2, 2))
        for graph in (
            builder.build_prefill_graph(PREFILL),
            builder.build_decode_graph(DECODE),
            builder.build_hybrid_graph(PREFILL, DECODE),
        ):
            before = graph.estimate_total_time()
            done = GraphOptimizer().optimize(graph)
            verify(done)
            assert done.estimate_total_time() <= before * 1.0001
            order = {each.node_id: i for i, each in enumerate(done.topological_sort())}
            chain = [each.node_id for each in done.get_critical_path()]
            assert all(order[a] < order[b] for a, b in pairwise(chain))
