"""Faults of one request: it ends with a reason, and the answers of the others do not change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.run import RunRequest, run_prompts
from sageLLM.runtime.engine.answer_rows import Progress
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.pipeline import StepInFlight, StepPipeline
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence
from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.text.detokenizer import Detokenizer
from sageLLM.runtime.worker import row_sampler
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.orders import StepResult

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
PROMPTS = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
BAD = 1
"""The index of the request that fails."""

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
# With a stop string the text of each answer is read in every step.
STOPPABLE = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=["never"])


class Panic(BaseException):
    """Like the panics of the tokenizers library, not an Exception."""


@pytest.fixture(scope="module", params=["hybrid", "time_share", "strict"])
def shared_llm(request: pytest.FixtureRequest) -> LLM:
    config = PDSchedulerConfig(mode=request.param, prefill_chunk_size=4)
    return LLM(MODEL, dtype="float32", scheduler=config, max_model_len=128, enable_prefix_caching=False)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The LLM of the module; after each test its engine must be idle and consistent, and must work."""
    yield shared_llm
    assert not shared_llm.engine.has_work
    shared_llm.engine.scheduler.check_integrity()
    assert shared_llm.engine.scheduler.get_stats()["kv_blocks_used"] == 0
    assert shared_llm.generate([PROMPTS[BAD]], GREEDY)[0].outputs[0].finish_reason == "length"


def run_with_fault(llm: LLM, patch: Callable[[], object], params: SamplingParams = GREEDY) -> RequestOutput:
    """The output of the bad request; checks that the other two have their usual answers."""
    expected = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    patch()
    outputs = llm.generate(PROMPTS, params)
    for index, (output, answer) in enumerate(zip(outputs, expected, strict=True)):
        assert output.finished
        if index != BAD:
            assert output.outputs[0] == answer
    return outputs[BAD]


def is_bad(request: Any) -> bool:
    return bool(request.prompt_token_ids == PROMPTS[BAD])


@pytest.mark.parametrize("num_outputs", [0, 3], ids=["prefill", "decode"])
def test_a_batch_that_fails_because_of_one_request(
    num_outputs: int, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = ModelRunner.run

    def fail_on_bad(self: ModelRunner, stage: Any, decodes: Any, chunks: Any, *args: Any) -> Any:
        sequences = [*decodes, *(chunk.sequence for chunk in chunks)]
        if any(is_bad(sequence) and len(sequence.output_token_ids) >= num_outputs for sequence in sequences):
            raise IndexError("slot out of range")
        return run(self, stage, decodes, chunks, *args)

    output = run_with_fault(llm, lambda: monkeypatch.setattr(ModelRunner, "run", fail_on_bad))
    answer = output.outputs[0]
    assert answer.finish_reason == "abort"
    assert answer.stop_reason == "the request failed: IndexError: slot out of range"
    assert len(answer.token_ids) == num_outputs
    assert f"request {output.request_id} ended early: {answer.stop_reason}" in caplog.messages
    monkeypatch.undo()


def test_a_batch_that_fails_for_every_request_ends_them_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ModelRunner, "run", fail)
    outputs = llm.generate(PROMPTS, GREEDY)
    reasons = {output.outputs[0].stop_reason for output in outputs}
    assert reasons == {"the request failed: RuntimeError: out of memory"}
    monkeypatch.undo()


def test_the_sampling_of_one_request_fails(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = row_sampler.sample

    def fail_on_bad(logits: torch.Tensor, batch: Any) -> Any:
        if any(is_bad(sequence) and len(sequence.output_token_ids) == 2 for sequence in batch.sequences):
            raise IndexError("index 99 is out of bounds")
        return sample(logits, batch)

    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True, logprobs=1)
    output = run_with_fault(llm, lambda: monkeypatch.setattr(row_sampler, "sample", fail_on_bad), params)
    assert output.outputs[0].stop_reason == "the request failed: IndexError: index 99 is out of bounds"
    assert len(output.outputs[0].token_ids) == 2
    monkeypatch.undo()


@pytest.mark.parametrize("error", [ValueError("bad piece"), Panic("bad piece")], ids=["Exception", "panic"])
def test_the_text_of_one_request_fails(error: BaseException, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Sequence.append

    def fail_on_bad(self: Sequence, token_id: int, logprobs: Any) -> None:
        if is_bad(self.request) and len(self.request.output_token_ids) == 2:
            raise error
        append(self, token_id, logprobs)

    output = run_with_fault(llm, lambda: monkeypatch.setattr(Sequence, "append", fail_on_bad), STOPPABLE)
    assert output.outputs[0].stop_reason == f"the request failed: {type(error).__name__}: bad piece"
    monkeypatch.undo()


def test_the_text_fails_when_it_is_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise Panic("decode")

    for name in ("append", "extend", "flush"):
        monkeypatch.setattr(Detokenizer, name, fail)
    answer = llm.generate([PROMPTS[BAD]], GREEDY)[0].outputs[0]
    assert (answer.text, answer.stop_reason) == ("", "the request failed: Panic: decode")
    states = list(llm.stream([PROMPTS[BAD]], GREEDY))
    assert states[-1].outputs[0].stop_reason == "the request failed: Panic: decode"
    monkeypatch.undo()


def test_the_scoring_of_one_prompt_fails(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    score = RequestGroup.score_prompt

    def fail_on_bad(self: RequestGroup, *args: Any) -> None:
        if list(self.prompt_token_ids) == PROMPTS[BAD]:
            raise IndexError("row")
        score(self, *args)

    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=1)
    output = run_with_fault(llm, lambda: monkeypatch.setattr(RequestGroup, "score_prompt", fail_on_bad), params)
    assert output.outputs[0].stop_reason == "the request failed: IndexError: row"
    monkeypatch.undo()


def test_a_request_that_the_scheduler_refuses(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = llm.engine.scheduler
    add = scheduler.add_request

    def fail_on_bad(request: Any) -> None:
        if is_bad(request) and request.fork_of is not None:
            raise ValueError("refused")
        add(request)

    monkeypatch.setattr(scheduler, "add_request", fail_on_bad)
    params = SamplingParams(n=2, max_tokens=4, temperature=1.0, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params)
    reasons = [[answer.stop_reason for answer in output.outputs] for output in outputs]
    assert reasons == [[None] * 2, ["the request failed: ValueError: refused"] * 2, [None] * 2]
    monkeypatch.undo()


def test_a_fault_ends_all_answers_of_the_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Sequence.append

    def fail_on_bad(self: Sequence, token_id: int, logprobs: Any) -> None:
        append(self, token_id, logprobs)
        if is_bad(self.request) and self.index == 1 and len(self.request.output_token_ids) == 2:
            raise ValueError("bad")

    params = SamplingParams(n=3, max_tokens=6, temperature=1.0, seed=1, ignore_eos=True, stop=["never"])
    output = run_with_fault(llm, lambda: monkeypatch.setattr(Sequence, "append", fail_on_bad), params)
    assert {answer.stop_reason for answer in output.outputs} == {"the request failed: ValueError: bad"}
    monkeypatch.undo()


def test_an_end_token_outside_the_vocabulary_is_ignored(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(tokenizer, "eos_token_ids", frozenset({10**6}))
    params = SamplingParams(max_tokens=4, min_tokens=2, temperature=1.0, seed=1)
    assert llm.generate([PROMPTS[BAD]], params)[0].outputs[0].finish_reason == "length"
    monkeypatch.undo()


def test_logits_that_are_not_finite_end_only_their_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    weight = "model.embed_tokens.weight"
    tensors[weight][PROMPTS[BAD][0]] = torch.nan
    tensors["lm_head.weight"] = load_file(MODEL / "model.safetensors").get("lm_head.weight", tensors[weight].clone())
    tensors["lm_head.weight"][PROMPTS[BAD][0]] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    llm = LLM(folder, dtype="float32", max_model_len=128)
    answers = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY)]
    assert [answer.finish_reason for answer in answers] == ["length", "abort", "length"]
    assert str(answers[BAD].stop_reason).startswith("the logits are not finite (NaN or infinity); ")
    assert any("the logits are not finite" in message for message in caplog.messages)
    with pytest.raises(PromptError, match="the embedding of prompt 1 is not finite"):
        llm.embed(PROMPTS)


def test_an_answer_that_ends_early_gets_no_token_of_a_step_in_flight(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = StepPipeline._complete

    def spoiled(self: StepPipeline, step: StepInFlight, results: list[StepResult]) -> Progress:
        for part, result in zip(step.parts, results, strict=True):
            if part.order.has_decodes and len(part.sampled[0].text.token_ids) == 4:
                result.not_finite.append(0)
        return complete(self, step, results)

    monkeypatch.setattr(StepPipeline, "_complete", spoiled)
    params = SamplingParams(n=2, max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)
    first, second = llm.generate([PROMPTS[BAD]], params)[0].outputs
    assert first.finish_reason == "abort" and len(first.token_ids) == 4
    assert second.finish_reason == "length" and len(second.token_ids) == 12


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_reports_an_aborted_prompt(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: ModelRunner, *args: object) -> None:
        raise IndexError("slot")

    monkeypatch.setattr(ModelRunner, "run", fail)
    request = RunRequest(
        model=MODEL,
        prompts=["def main("],
        max_tokens=4,
        temperature=0.0,
        seed=None,
        engine=EngineOptions(dtype="float32", max_model_len=128),
        as_json=as_json,
    )
    assert run_prompts(request) == 1
    out, err = capsys.readouterr()
    reason = "the request failed: IndexError: slot"
    assert err.splitlines()[-1] == f"error: prompt 1 was aborted: {reason}"
    assert err.startswith("KV cache: ")
    if as_json:
        assert (json.loads(out)["finish_reason"], json.loads(out)["stop_reason"]) == ("abort", reason)
    else:
        assert out == ""


def test_a_request_that_cannot_finish_in_the_pool_is_refused() -> None:
    llm = LLM(MODEL, dtype="float32", block_size=4, num_kv_blocks=4)
    with pytest.raises(SamplingParamsError) as caught:
        llm.generate([[9] * 10], SamplingParams(max_tokens=7))
    assert str(caught.value) == (
        "prompt and answer must fit the 16 tokens of the KV cache, got 10 + 7; lower max_tokens, or raise num_kv_blocks"
    )
    for max_tokens in (6, None):
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        answer = llm.generate([[9] * 10], params)[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (6, "length")
