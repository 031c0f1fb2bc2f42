"""Prefill and decode workers in processes: answers are those of one process, also when workers die."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.disaggregated import DisaggregatedEngine
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.pd_timeline import STEPS, TRANSFERS
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.loader.checkpoint_index import SINGLE_FILE
from sageLLM.runtime.scheduler.transfer import TransferConfig
from sageLLM.runtime.transport.nixl import has_nixl

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PROMPTS = [[10, 11, 12], [20, 21], [30 + i for i in range(40)], [10, 11, 13], [7] * 90]
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=24, n=2, temperature=1.0, seed=3, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, seed=4, prompt_logprobs=1, stop=["self"], min_tokens=4),
    SamplingParams(max_tokens=1, temperature=0.8, top_p=0.9, seed=5, logit_bias={7: 1.0}),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=6, presence_penalty=0.5),
]


def load(folder: Path = MODEL, *, by_layer: bool = False, **options: Any) -> LLM:
    config = PDSchedulerConfig(mode="strict", max_prefill_tokens=32, transfer=TransferConfig(by_layer=by_layer))
    return LLM(folder, dtype="float32", max_model_len=256, scheduler=config, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def engine_of(llm: LLM) -> DisaggregatedEngine:
    assert isinstance(llm.engine, DisaggregatedEngine)
    return llm.engine


def assert_free(llm: LLM) -> None:
    engine = engine_of(llm)
    assert engine.scheduler_stats()["kv_blocks_used"] == 0
    engine.group.check_integrity()


@pytest.fixture(scope="module")
def alone() -> LLM:
    return load()


@pytest.fixture(scope="module")
def divided() -> Iterator[LLM]:
    """Roles of different degrees and block sizes, connected by TCP."""
    llm = load(
        prefill_workers=1,
        decode_workers=1,
        decode_tensor_parallel_size=2,
        decode_block_size=8,
        kv_transport="tcp",
    )
    yield llm
    llm.close()


def test_answers_are_those_of_one_process(divided: LLM, alone: LLM) -> None:
    expected, found = alone.generate(PROMPTS, PARAMS), divided.generate(PROMPTS, PARAMS)
    assert tokens(found) == tokens(expected)
    for output, other in zip(found, expected, strict=True):
        assert [one.text for one in output.outputs] == [one.text for one in other.outputs]
        assert (output.prompt_logprobs is None) == (other.prompt_logprobs is None)
    assert_free(divided)


def test_a_conversation_reads_its_answers_back(divided: LLM, alone: LLM) -> None:
    prompt = [40 + i % 50 for i in range(30)]
    params = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
    for _ in range(2):
        expected = alone.generate([prompt], params)
        before = engine_of(divided).scheduler_stats()
        found = divided.generate([prompt], params)
        assert tokens(found) == tokens(expected)
        prompt = [*prompt, *found[0].outputs[0].token_ids, 5, 6]
    after = engine_of(divided).scheduler_stats()
    assert after["total_read_back"] - before["total_read_back"] == 1
    assert found[0].num_cached_tokens == 112  # whole blocks of the decode worker, of the 119 tokens with KV
    assert_free(divided)


def test_an_abandoned_stream_leaves_nothing(divided: LLM) -> None:
    stream = divided.stream(PROMPTS, GREEDY)
    for _ in range(3):
        next(stream)
    stream.close()
    divided.generate([[1, 2]], SamplingParams(max_tokens=2))
    assert_free(divided)


@pytest.fixture(scope="module", params=["shared_memory", *(["nixl"] if has_nixl() else [])])  # `make nixl`
def several(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two prefill workers and a decode worker; chunks are copied layer by layer while they are computed."""
    llm = load(by_layer=True, prefill_workers=2, decode_workers=1, kv_transport=request.param)
    yield llm
    llm.close()


def test_a_timeline_has_an_arrow_from_each_prefill_to_its_transfer(several: LLM) -> None:
    engine = engine_of(several)
    timeline = engine.record_timeline()
    several.generate(PROMPTS, GREEDY)
    events = json.loads(timeline.to_json([status.role for status in engine.workers()]))["traceEvents"]
    by_phase = {phase: [one for one in events if one["ph"] == phase] for phase in "XsfM"}
    transfers = [one for one in by_phase["X"] if one["tid"] == TRANSFERS]
    assert {one["args"]["request"] for one in transfers} == {f"{i}/0" for i in range(len(PROMPTS))}
    steps = [one for one in by_phase["X"] if one["tid"] == STEPS]
    assert {one["name"].split()[0] for one in steps if one["pid"] == 2} == {"decode"}
    ends = {one["id"]: one for one in by_phase["f"]}
    for start in by_phase["s"]:
        end = ends[start["id"]]
        assert start["ts"] <= end["ts"] and end["pid"] == 2
        if start["id"].endswith("sent"):  # in the step that computes it
            step = next(one for one in steps if one["pid"] == start["pid"] and one["ts"] + one["dur"] >= start["ts"])
            assert step["name"].startswith("prefill") and step["ts"] <= start["ts"]
    assert len(ends) == len(by_phase["s"]) == 2 * len(transfers)


def test_a_worker_changes_its_role_while_it_serves(several: LLM, alone: LLM) -> None:
    """From prefill to decode and back; requests arrive all the time, and it serves some in every role."""
    engine, prompts = engine_of(several), PROMPTS * 8
    expected = tokens(alone.generate(prompts, GREEDY))
    answers: dict[int, tuple[int, ...]] = {}
    roles: list[str] = []
    names = iter(range(len(prompts)))
    for name in islice(names, 8):
        engine.add(str(name), None, prompts[name], GREEDY)
    while engine.has_work:
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = output.outputs[0].token_ids
                for name in islice(names, 1):
                    engine.add(str(name), None, prompts[name], GREEDY)
        status = engine.workers()[1]
        if status.num_requests and status.role not in roles[-1:]:
            roles.append(status.role)
            engine.set_role(1, "decode" if status.role == "prefill" else "prefill")
    assert roles[:3] == ["prefill", "decode", "prefill"]
    assert [[answers[name]] for name in range(len(prompts))] == expected
    assert_free(several)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_workers_cost_no_request(
    several: LLM, alone: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    """One worker of each role dies or stands still, the second one while the first is started again."""
    engine = engine_of(several)
    for executor in engine.executor.executors:
        monkeypatch.setattr(executor, "step_seconds", 2.0 if sent is signal.SIGSTOP else executor.step_seconds)
    expected = tokens(alone.generate(PROMPTS, GREEDY))
    last: dict[str, RequestOutput] = {}
    emitted: dict[str, int] = {}
    before = engine.workers()
    roles = [status.role for status in before]
    ids = [engine.executor.process_ids[roles.index(role)] for role in ("prefill", "decode")]
    with caplog.at_level(logging.ERROR, "sagellm"):
        for count, output in enumerate(several.stream(PROMPTS, GREEDY)):
            if count in (2, 40):
                os.kill(ids[count == 40], sent)
            last[output.request_id] = output
            num = len(output.outputs[0].token_ids)
            assert num > emitted.get(output.request_id, 0), "a token was emitted twice"
            emitted[output.request_id] = num
    assert sorted(tokens(list(last.values()))) == sorted(expected)
    deadline = time.monotonic() + 30.0
    while (starts := sum(status.epoch for status in engine.workers()) - sum(one.epoch for one in before)) < 2:
        assert time.monotonic() < deadline, f"{starts} workers were started again: {before}, {engine.workers()}"
        several.generate(PROMPTS, GREEDY)  # a loss is noticed by the next step of the worker
    assert ("was killed by signal 9" if sent is signal.SIGKILL else "hangs") in caplog.text
    assert_free(several)


def test_a_worker_does_not_start_again_with_other_weights(tmp_path: Path) -> None:
    """The other workers have KV of the first ones."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    llm = load(folder, prefill_workers=1, decode_workers=1)
    weights = load_file(folder / SINGLE_FILE)
    name = next(one for one in weights if "down_proj" in one)
    save_file(weights | {name: weights[name] * 1.01}, folder / "new")
    (folder / "new").replace(folder / SINGLE_FILE)
    os.kill(engine_of(llm).executor.process_ids[0], signal.SIGKILL)
    with pytest.raises(EngineError, match="the checkpoint has changed meanwhile, weights: "):
        llm.generate(PROMPTS[:1], GREEDY)
    llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_workers": 1}, "prefill_workers requires decode_workers: both roles"),
        ({"prefill_workers": 0, "decode_workers": 1}, "prefill_workers must be an integer of at least 1, got 0"),
        (
            {"scheduler": PDSchedulerConfig(mode="hybrid")},
            "requires mode 'strict', got 'hybrid': only --pd strict",
        ),
        ({"prefill_tensor_parallel_size": 3}, "^prefill_tensor_parallel_size=3 does not divide num_key_value_heads=2"),
        ({"af": "1:1"}, "prefill_workers must not be combined with af"),
        ({"pipeline_parallel_size": 2}, "prefill_workers must not be combined with pipeline_parallel_size=2"),
        ({"kv_tier": "host"}, "prefill_workers must not be combined with kv_tier='host'"),
        ({"kv_transport": "pigeon"}, "kv_transport must be one of shared_memory, tcp, nixl; got 'pigeon'"),
        ({"kv_load_failure_policy": "hope"}, "kv_load_failure_policy must be one of recompute, fail; got 'hope'"),
        ({"distributed_executor_backend": "uni"}, "'uni'"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    strict = {"prefill_workers": 1, "decode_workers": 1, "scheduler": PDSchedulerConfig(mode="strict")}
    if options == {"prefill_workers": 1}:
        del strict["decode_workers"]
    with pytest.raises(SageError, match=message):
        LLM(MODEL, **(strict | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "transport", "tp"), [("int8", "tcp", 2), ("fp8", "shared_memory", 1)])
def test_kv_of_8_bits_is_copied_with_its_scales(form: str, transport: str, tp: int) -> None:
    """Between roles of different block sizes, and of different degrees.

    Ranks add in another order, so that a key may get another code; drawn tokens can then differ.
    """
    params = GREEDY if tp > 1 else PARAMS
    llm = load(
        prefill_workers=1,
        decode_workers=1,
        decode_tensor_parallel_size=tp,
        decode_block_size=8,
        kv_transport=transport,
        kv_cache_dtype=form,
    )
    try:
        expected = load(kv_cache_dtype=form).generate(PROMPTS, params)
        assert tokens(llm.generate(PROMPTS, params)) == tokens(expected)
        assert_free(llm)
    finally:
        llm.close()
