"""Rotary scalings that depend on the length of a sequence, against transformers below, at and above the trained length.

- longrope: each answer token is the one after a forward pass over all tokens before it, without a cache. Phi-3 in
  transformers generates the same tokens: it drops its cache at the trained length.
- dynamic: each answer token is the one that transformers generates with its cache, which keeps rotated keys.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.loader import tables
from sageLLM.runtime.loader.model import load_model
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.worker.executor import InProcessExecutor

MakeCheckpoint = Callable[..., Path]
MODES = ("time_share", "hybrid", "strict", "auto")
TRAINED = 24
NUM_NEW = 10
TOLERANCE = 1e-4
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": (
        "Phi3",
        {
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 1.0},
            "original_max_position_embeddings": TRAINED,
        },
    ),
    "llama longrope": ("Llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": TRAINED}}),
    "llama dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED}),
    "stablelm dynamic": (
        "StableLm",
        {"rope_parameters": {**DYNAMIC, "partial_rotary_factor": 0.5}, "max_position_embeddings": TRAINED},
    ),
}
PARAMS = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
SHARED = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, logprobs=0, ignore_eos=True)


class Answer(NamedTuple):
    """Generated tokens, their log-probabilities, and those of the prompt after its first token."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Below, at and above the trained length; with the answers, all ways to cross it.
PROMPTS = [prompt_of(length, seed=length) for length in (5, TRAINED - NUM_NEW, 20, 23, 24, 25, 40)]


@pytest.fixture(scope="module")
def folders(make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    return {name: make_checkpoint(family, eos_token_id=None, **config) for name, (family, config) in MODELS.items()}


@cache
def reference_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def fresh(folder: Path) -> Any:
    """The model without the lengths that it has seen: dynamic scaling keeps the base of a longer sequence."""
    model = reference_model(folder)
    rope = model.model.rotary_emb
    rope.max_seq_len_cached, rope.inv_freq = rope.original_max_seq_len, rope.original_inv_freq.clone()
    return model


@torch.inference_mode()
def logprobs_of(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """The log-probabilities after each token, from one forward pass."""
    return fresh(folder)(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@cache
def generated(folder: Path, prompt: tuple[int, ...], num_new: int = NUM_NEW) -> Answer:
    """The answer of transformers' `generate` with its cache."""
    found = fresh(folder).generate(
        torch.tensor([prompt]),
        max_new_tokens=num_new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = found.sequences[0, len(prompt) :].tolist()
    rows = [logits[0].log_softmax(-1) for logits in found.logits]
    return Answer(tokens, [row[t].item() for row, t in zip(rows, tokens, strict=True)], scores(folder, prompt))


def scores(folder: Path, prompt: tuple[int, ...]) -> list[float]:
    rows = logprobs_of(folder, list(prompt))
    return [rows[i, token].item() for i, token in enumerate(prompt[1:])]


@cache
def recomputed(folder: Path, prompt: tuple[int, ...], num_new: int = NUM_NEW) -> Answer:
    """The answer of one forward pass per token, without a cache."""
    token_ids = list(prompt)
    logprobs = []
    for _ in range(num_new):
        row = logprobs_of(folder, token_ids)[-1]
        token_ids.append(int(row.argmax()))
        logprobs.append(row[token_ids[-1]].item())
    return Answer(token_ids[len(prompt) :], logprobs, scores(folder, prompt))


def reference(folder: Path, name: str, prompt: list[int], num_new: int = NUM_NEW) -> Answer:
    return (generated if "dynamic" in name else recomputed)(folder, tuple(prompt), num_new)


def assert_same(output: RequestOutput, expected: Answer) -> None:
    for answer in output.outputs:
        assert list(answer.token_ids) == expected.tokens
        assert answer.cumulative_logprob == pytest.approx(sum(expected.logprobs), abs=TOLERANCE * NUM_NEW)
        assert answer.logprobs is not None
        found = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert found == pytest.approx(expected.logprobs, abs=TOLERANCE)
    if output.prompt_logprobs is not None:
        scored = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        found = [entry[token].logprob for entry, token in scored if entry]
        assert found == pytest.approx(expected.prompt_logprobs, abs=TOLERANCE)


@cache
def load(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", skip_tokenizer=True, num_kv_blocks=16)


def make_engine(
    folder: Path, mode: str, budget: KVBudget | None = None, *, is_async: bool = True, **limits: Any
) -> Engine:
    """An engine of its own on the model of the folder; it plans ahead if `is_async`."""
    config = PDSchedulerConfig(mode=mode, **{"prefill_chunk_size": 8, "max_prefill_tokens": 16} | limits)
    llm = load(folder)
    budget = budget or KVBudget(128, 4)
    executor = InProcessExecutor(llm.model, llm.compiler, budget, is_split=mode == "strict", is_async=is_async)
    return Engine(llm.model, None, llm.compiler, config, budget, executor, async_scheduling=is_async)


def serve(engine: Engine, prompts: list[list[int]], params: SamplingParams = PARAMS) -> Iterator[RequestOutput]:
    for i, prompt in enumerate(prompts):
        engine.add(str(i), None, prompt, params)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step(only_finished=True)}
    engine.scheduler.check_integrity()
    yield from (outputs[str(i)] for i in range(len(prompts)))


def num_recomputed(engine: Engine) -> int:
    return engine.scheduler.get_stats()["total_preemptions"]


@pytest.mark.parametrize(("mode", "is_async"), [*((mode, True) for mode in MODES), ("hybrid", False)])
@pytest.mark.parametrize("name", MODELS)
def test_lengths_below_at_and_above_the_trained_one(
    name: str, mode: str, is_async: bool, folders: dict[str, Path]
) -> None:
    """In chunks, while others decode. Only longrope recomputes, and once per request that crosses."""
    folder = folders[name]
    engine = make_engine(folder, mode, is_async=is_async)
    for prompt, output in zip(PROMPTS, serve(engine, PROMPTS), strict=True):
        assert_same(output, reference(folder, name, prompt))
    # The prompt of 14 ends with the trained length, and those of 25 and 40 begin beyond it.
    assert num_recomputed(engine) == (3 if "longrope" in name else 0)


def test_references(folders: dict[str, Path]) -> None:
    """The two references are equal for Phi-3, and differ where a cache keeps keys of other frequencies."""
    differ = {
        name: [
            generated(folder, tuple(prompt)).logprobs
            != pytest.approx(recomputed(folder, tuple(prompt)).logprobs, abs=TOLERANCE)
            for prompt in PROMPTS
        ]
        for name, folder in folders.items()
    }
    crossing = [False, False, True, True, True, False, False]
    assert differ["phi3 longrope"] == [False] * len(PROMPTS)
    assert differ["llama longrope"] == crossing
    assert differ["llama dynamic"] == [False, False, True, True, True, True, True]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_the_prefix_cache_separates_keys_of_different_frequencies(
    name: str, mode: str, folders: dict[str, Path]
) -> None:
    """A prompt, its conversation beyond the trained length, and both again."""
    folder, short = folders[name], prompt_of(20, seed=3)
    long = [*short, *reference(folder, name, short).tokens, 7]
    longer = [*long, 8]
    engine = make_engine(folder, mode)
    hits = []
    for prompt in (short, long, short, long, longer, long[:24], long[:25]):
        (output,) = serve(engine, [prompt], SHARED)
        assert_same(output, reference(folder, name, prompt))
        hits.append(output.num_cached_tokens)
    # A long prompt finds the recomputed conversation of longrope; with dynamic scaling only prompts of its length.
    of_longrope = [0, 28 if mode != "strict" else 24, 16, 28, 28, 20, 24]
    assert hits == (of_longrope if "longrope" in name else [0, 0, 16, 28, 0, 20, 0])


@pytest.mark.parametrize("tiers", [{}, {"num_host_blocks": 40}], ids=["recompute", "swap"])
@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_preempted_requests(name: str, tiers: dict[str, int], folders: dict[str, Path]) -> None:
    """A pool for about two sequences: requests are preempted on both sides of the trained length."""
    folder = folders[name]
    mode = "swap" if tiers else "recompute"
    engine = make_engine(folder, "hybrid", KVBudget(22, 4, **tiers), preemption_mode=mode)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 5] * 2
    for prompt, output in zip(prompts, serve(engine, prompts, SHARED), strict=True):
        assert_same(output, reference(folder, name, prompt))
    num_crossing = sum(len(prompt) <= TRAINED < len(prompt) + NUM_NEW - 1 for prompt in prompts)
    expected = num_crossing if "longrope" in name else 0
    assert num_recomputed(engine) > expected, "the pool was meant to be too small"


@pytest.mark.parametrize(("mode", "reserves"), [*((mode, False) for mode in MODES), ("hybrid", True)])
@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_forks(name: str, mode: str, reserves: bool, folders: dict[str, Path]) -> None:
    """Three answers to prompts that cross with the first token, later, and not at all."""
    folder = folders[name]
    engine = make_engine(folder, mode, enable_preemption=not reserves)
    params = SamplingParams(n=3, max_tokens=NUM_NEW, top_k=1, logprobs=0, ignore_eos=True)
    for prompt, output in zip(PROMPTS, serve(engine, PROMPTS, params), strict=True):
        assert len(output.outputs) == 3
        assert_same(output, reference(folder, name, prompt))


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_the_process_that_sends_steps_to_workers_knows_the_lengths(name: str, folders: dict[str, Path]) -> None:
    """It loads no weights, but schedules the recomputations and names the keys in the prefix cache."""
    device = torch.device("cpu")
    options = {"dtype": "auto", "device": device, "max_model_len": None}
    lengths = load_model(folders[name], load_registry(), has_weights=False, **options).tables
    assert (lengths.switch_len, lengths.dynamic_len) == ((TRAINED, None) if "longrope" in name else (None, TRAINED))


def test_a_request_that_ends_at_the_trained_length_is_not_recomputed(folders: dict[str, Path]) -> None:
    """Its last token is the first one beyond the length, and is computed with the short factors."""
    folder = folders["phi3 longrope"]
    for mode in MODES:
        engine = make_engine(folder, mode)
        params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=0, ignore_eos=True)
        (output,) = serve(engine, [prompt_of(20)], params)
        assert_same(output, recomputed(folder, tuple(prompt_of(20)), 5))
        assert num_recomputed(engine) == 0


def test_more_prompt_tokens_than_a_step_has_rows_for(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is repeated request by request."""
    monkeypatch.setattr(tables, "MIN_STEP_ROWS", 1)
    folder = folders["llama dynamic"]
    llm = LLM(
        folder,
        dtype="float32",
        skip_tokenizer=True,
        scheduler=PDSchedulerConfig(max_prefill_tokens=400),
        num_kv_blocks=64,
    )
    prompts = [prompt_of(length, seed=length) for length in (70, 50, 60)]
    for prompt, output in zip(prompts, llm.generate(prompts, SHARED), strict=True):
        assert_same(output, generated(folder, tuple(prompt)))


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    mode=st.sampled_from(MODES),
    chunk=st.integers(2, 20),
    num_blocks=st.integers(13, 40),
    block_size=st.sampled_from([1, 4, 5]),
    caching=st.booleans(),
    is_async=st.booleans(),
    name=st.sampled_from(["phi3 longrope", "llama dynamic"]),
)
def test_any_schedule(
    folders: dict[str, Path],
    lengths: list[int],
    mode: str,
    chunk: int,
    num_blocks: int,
    block_size: int,
    caching: bool,
    is_async: bool,
    name: str,
) -> None:
    """Prompts with common prefixes, in any mode, with any chunks and pools."""
    folder = folders[name]
    prompts = [prompt_of(40)[:length] for length in lengths]
    budget = KVBudget(num_blocks * 4 // block_size + 1, block_size)
    options = {"max_prefill_tokens": chunk, "enable_prefix_caching": caching}
    engine = make_engine(folder, mode, budget, is_async=is_async, **options)
    for prompt, output in zip(prompts, serve(engine, prompts, SHARED), strict=True):
        assert_same(output, reference(folder, name, prompt))


@pytest.mark.parametrize("name", MODELS)
def test_embeddings(name: str, folders: dict[str, Path]) -> None:
    """Prompts on both sides share a step; each has the frequencies of its length."""
    folder = folders[name]
    found = load(folder).embed(PROMPTS, pooling="none")
    for prompt, output in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            states = fresh(folder).model(torch.tensor([prompt])).last_hidden_state[0]
        assert output.embedding.tolist() == pytest.approx(states, abs=TOLERANCE)
