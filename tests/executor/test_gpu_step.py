"""The step on a GPU, on a device that records its operations: copies, waits, allocations and captures."""

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.runtime.executor import buckets as buckets_module
from sageLLM.runtime.executor.buckets import Buckets, row_buckets, table_widths
from sageLLM.runtime.executor.device_api import CudaApi
from sageLLM.runtime.executor.token_reader import TokenReader, marked_tokens
from sageLLM.runtime.sampling.sampler import scale_by_temperature
from sageLLM.runtime.sampling.weights import invert_cdf, weigh

from .recorded_device import MODEL, RecordedDevice, counted, llm_on
from .stubbed_triton import launched, recorded_compilations

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=40, temperature=0.8, seed=5, ignore_eos=True)
by_temperature = pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
SIZES = {"block_size": 4, "max_model_len": 200, "num_kv_blocks": 120}


def scheduler(mode: str) -> PDSchedulerConfig:
    return PDSchedulerConfig(mode=mode, max_decode_batch_size=6, max_prefill_tokens=32, prefill_chunk_size=24)


@by_temperature
def test_a_steady_decode_step_is_one_copy_in_one_replay_one_copy_out_and_one_wait(params: SamplingParams) -> None:
    device = RecordedDevice()
    llm = llm_on(device, scheduler=scheduler("time_share"), async_scheduling=False, **SIZES)
    for number in range(3):
        llm.engine.add(str(number), None, [5 + number, 7, 11], params)
    for _ in range(6):
        llm.engine.step()
    for _ in range(20):  # blocks of 4 tokens: the tables grow meanwhile
        with counted(device) as counts:
            llm.engine.step(only_finished=True)
        assert counts == {"copies in": 1, "replays": 1, "copies out": 1, "waits": 1}


@by_temperature
def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_read(params: SamplingParams) -> None:
    """At every wait of a steady decode the graphs of this step and of the next one have been started."""
    device = RecordedDevice()
    llm = llm_on(device, scheduler=scheduler("time_share"), **SIZES)
    started: list[int] = []

    def before_wait() -> None:
        started.append(device.counts["replays"])
        device.step_seconds = 10 if len(started) < 30 else 0.01  # the last step has no successor

    device.before_wait = before_wait
    device.counts["replays"] = 0
    [output] = llm.generate([[5, 7, 11]], params)
    # The first wait is that of the prompt, and the first decode is launched after it.
    assert started[2:30] == [*range(3, 31)]
    expected = LLM(MODEL, dtype="float32", kernels="reference", skip_tokenizer=True).generate([[5, 7, 11]], params)
    assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids


@pytest.mark.parametrize("mode", ["hybrid", "strict"])
def test_serving_compiles_and_captures_nothing_and_returns_the_tokens_of_the_cpu(mode: str) -> None:
    """Random prompts and lengths, also beyond the first width of the block table; the work of a step starts late."""
    device, draw = RecordedDevice(), random.Random(mode)
    prompts = [[draw.randrange(3, 400) for _ in range(draw.choice([2, 9, 30, 150]))] for _ in range(8)]
    params = [
        SamplingParams(
            max_tokens=draw.randrange(1, 30), temperature=heat, seed=3, n=2 if heat else 1, prompt_logprobs=scored
        )
        for heat, scored in [(0.0, None)] * 4 + [(0.0, 1)] * 2 + [(0.7, None)] * 2
    ]
    options: dict[str, Any] = {**SIZES, "scheduler": scheduler(mode)}
    with recorded_compilations() as compiled:
        llm = llm_on(device, launched(KERNELS), **options)
        at_load, num_compiled = device.counts.copy(), len(compiled)
        assert at_load["captures"] == len(row_buckets(6)) * len(table_widths(50))
        assert {"_paged_decode_attention_split", "_paged_prefill_attention_kernel"} <= set(compiled)
        found = llm.generate(prompts, params)
    assert compiled[num_compiled:] == []
    assert device.counts["captures"] == at_load["captures"]
    assert device.counts["allocations"] <= at_load["allocations"]
    assert device.counts["replays"] > 20
    expected = LLM(MODEL, dtype="float32", kernels="reference", skip_tokenizer=True, **options).generate(
        prompts, params
    )
    assert [[one.token_ids for one in output.outputs] for output in found] == [
        [one.token_ids for one in output.outputs] for output in expected
    ]


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
def test_steps_of_many_sequences_compile_nothing(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is specialised to 128, 256, ... sequences: of hybrid steps, and of decodes that are not captured."""
    monkeypatch.setattr(buckets_module, "MAX_ROWS", 64)
    sizes: dict[str, int] = {}

    def measured(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **attrs: Any) -> Any:
            sizes[op] = max(sizes.get(op, 0), len(operands[4]))
            return kernel(*operands, **attrs)

        return call

    kernels = launched(KERNELS)
    attention = {op: measured(op, kernels[op]) for op in ("paged_decode_attention", "paged_prefill_attention")}
    many = PDSchedulerConfig(mode="hybrid", max_decode_batch_size=140, max_prefill_tokens=180, prefill_chunk_size=60)
    options: dict[str, Any] = {"block_size": 4, "max_model_len": 40, "num_kv_blocks": 900, "scheduler": many}
    prompts = [[3 + number % 300] for number in range(150)]
    with recorded_compilations() as compiled:
        llm = llm_on(RecordedDevice(), {**kernels, **attention}, enforce_eager=eager, **options)
        num_compiled = len(compiled)
        sizes.clear()
        llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert min(sizes.values()) > 128 and len(sizes) == 2
    assert compiled[num_compiled:] == []


def test_steps_of_experts_compile_nothing(make_checkpoint: Callable[..., Path]) -> None:
    """Tables and tiles of experts follow the number of tokens: without a table, and with 1 to 48 rows an expert."""
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
    mixed = PDSchedulerConfig(mode="hybrid", max_decode_batch_size=6, max_prefill_tokens=120, prefill_chunk_size=120)
    draw = random.Random(4)
    prompts = [[draw.randrange(3, 190) for _ in range(draw.choice([1, 2, 20, 60, 110]))] for _ in range(12)]
    with recorded_compilations() as compiled:
        model = make_checkpoint("Qwen3Moe", **sizes)
        llm = llm_on(RecordedDevice(), launched(KERNELS), model, **{**SIZES, "scheduler": mixed})
        num_compiled = len(compiled)
        llm.generate(prompts, SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert Counter(compiled)["_routing_kernel"] > 1
    assert Counter(compiled)["_expert_linear_kernel"] > 2
    assert compiled[num_compiled:] == []


def test_a_row_that_is_not_finite_ends_its_request_alone() -> None:
    device = RecordedDevice()

    def spoiled(hidden: torch.Tensor, *rest: Any, **attrs: Any) -> Any:
        values, _ = KERNELS["lm_head_sample"](hidden, *rest, **attrs)
        if len(values) > 1:
            values[0] = torch.nan
        return values, values.argmax(-1)

    llm = llm_on(device, {"lm_head_sample": spoiled}, scheduler=scheduler("time_share"), **SIZES)
    first, second = llm.generate([[5, 7], [6, 8, 9]], GREEDY)
    assert (first.outputs[0].finish_reason, second.outputs[0].finish_reason) == ("abort", "length")
    assert len(second.outputs[0].token_ids) == GREEDY.max_tokens


def test_failed_rows_are_marked_in_the_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf], [3.0, 0.0]])
    marked = marked_tokens(values, values.argmax(-1))
    assert marked.tolist() == [1, -1, -1, -1, 0]
    assert marked_tokens(values, values.argmax(-1), torch.tensor([1.0] * 4 + [torch.nan])).tolist()[-1] == -1
    device = RecordedDevice()
    pending = TokenReader(device).start(marked)
    assert pending.read(5) == ([1, 0, 0, 0, 0], [1, 2, 3])
    assert pending.rows(slice(3, 4)).read(1) == ([0], [0])


def test_the_op_draws_what_the_engine_draws_on_a_cpu() -> None:
    """Also at both ends of the distribution, and in a row that must stay greedy."""
    torch.manual_seed(1)
    logits, temperature = torch.randn(40, 5000) * 4, torch.rand(40) * 2 + 0.05
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 1.0 - 2.0**-53, 0.5])
    expected = invert_cdf(weigh(scale_by_temperature(logits, temperature)), uniform)
    greedy = logits.argmax(-1)
    temperature[-1] = 0.0
    found = KERNELS["draw"](logits, greedy, temperature, uniform)
    assert found[:-1].tolist() == expected[:-1].tolist()
    assert found[-1] == greedy[-1]
    assert (found != greedy).sum() > 10


def test_graphs_are_captured_in_one_pool_next_to_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mode "thread_local" the calls of other threads, such as copies to tiers, do not end a capture."""
    captured: list[dict[str, Any]] = []

    @contextmanager
    def graph(graph: Any, **options: Any) -> Iterator[None]:
        captured.append(options)
        yield

    for name, value in {"CUDAGraph": object, "graph": graph, "graph_pool_handle": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    api, kept = CudaApi(), torch.arange(6.0)
    for _ in range(2):
        made = kept[2:].view(2, 2)
        owner = weakref.ref(made)
        _, [output] = api.capture(lambda made=made: [made])
        assert output.tolist() == [[2, 3], [4, 5]]
        del made
        assert owner() is None  # the results keep no memory from later captures
        kept[2] = 2.0
        assert output.data_ptr() == kept[2:].data_ptr()
    assert captured[0] == captured[1] == {"pool": captured[0]["pool"], "capture_error_mode": "thread_local"}


def test_buckets() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(6) == (1, 2, 4, 8)
    assert row_buckets(10**6)[-1] == 256
    assert table_widths(20) == (20,)
    assert table_widths(8192) == (32, 128, 512, 2048, 8192)
    buckets = Buckets(row_buckets(6), table_widths(40), padding_block=3)
    assert [buckets.num_rows(count) for count in (1, 3, 8, 9)] == [1, 4, 8, 9]
    assert [buckets.width(count) for count in (1, 32, 33, 40)] == [32, 32, 40, 40]
    assert next(buckets.descending()) == (8, 40)
