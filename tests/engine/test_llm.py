"""The public `LLM` on the bundled tiny model: sampling, log-probabilities, stops, streams, chat, n answers."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
PROMPTS = ["import os\nimport ", "class Point:\n    def __init__(self", "def main("]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="hybrid", prefill_chunk_size=8))


def test_hybrid_is_the_default_mode() -> None:
    with_default = LLM(MODEL, dtype="float32")
    assert with_default.engine.scheduler.config == PDSchedulerConfig(mode="hybrid")
    assert PDSchedulerConfig().mode == "time_share", "the default of the config itself"


def test_the_text_equals_that_of_transformers(llm: LLM) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    for prompt, output in zip(
        PROMPTS, llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0)), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert list(output.prompt_token_ids) == ids[0].tolist()
        assert output.outputs[0].text == tokenizer.decode(new, skip_special_tokens=True)


def test_logprobs_are_those_of_the_raw_distribution(llm: LLM) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    params = SamplingParams(max_tokens=6, temperature=0.7, top_p=0.9, seed=3, logprobs=4)
    output = llm.generate(PROMPTS[0], params)[0]
    answer = output.outputs[0]
    ids = torch.tensor([[*output.prompt_token_ids, *answer.token_ids]])
    with torch.inference_mode():
        expected = model(ids).logits[0].log_softmax(-1)[len(output.prompt_token_ids) - 1 :]
    assert answer.logprobs is not None and answer.cumulative_logprob is not None
    for row, entries, token in zip(expected, answer.logprobs, answer.token_ids, strict=False):
        assert entries[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert entries[token].rank == 1 + int((row > row[token]).sum())
        assert set(row.topk(4).indices.tolist()) <= set(entries)
    total = sum(entries[token].logprob for entries, token in zip(answer.logprobs, answer.token_ids, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_a_seed_fixes_the_answer_alone_in_a_batch_and_in_every_mode(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, top_k=50, seed=11)
    alone = llm.generate(PROMPTS[1], params)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=16, seed=i) for i in (1, 2)]
    batched = llm.generate([PROMPTS[0], PROMPTS[1], PROMPTS[2]], [others[0], params, others[1]])
    assert batched[1].outputs[0].token_ids == alone
    for mode in ("time_share", "strict"):
        other = LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode=mode))
        assert other.generate(PROMPTS[1], params)[0].outputs[0].token_ids == alone
    assert (
        llm.generate(PROMPTS[1], SamplingParams(max_tokens=16, temperature=1.0, seed=12))[0].outputs[0].token_ids
        != alone
    )


def test_n_answers_differ_and_come_in_one_output(llm: LLM) -> None:
    output = llm.generate(PROMPTS[1], SamplingParams(n=3, max_tokens=16, temperature=1.0, seed=5))[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in output.outputs}) == 3
    assert output.finished and all(answer.finish_reason for answer in output.outputs)


def test_the_text_ends_before_a_stop_string(llm: LLM) -> None:
    free = llm.generate(PROMPTS[2], SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text
    stop = free[7:11]
    answer = llm.generate(PROMPTS[2], SamplingParams(max_tokens=40, temperature=0, stop=stop))[0].outputs[0]
    assert answer.text == free[: free.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    kept = SamplingParams(max_tokens=40, temperature=0, stop=[stop], include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[2], kept)[0].outputs[0].text == free[: free.index(stop)] + stop


def test_a_stop_id_and_max_tokens_end_the_answer(llm: LLM) -> None:
    ids = llm.generate(PROMPTS[2], SamplingParams(max_tokens=10, temperature=0))[0].outputs[0].token_ids
    stopped = llm.generate(PROMPTS[2], SamplingParams(max_tokens=10, temperature=0, stop_token_ids=[ids[4]]))
    assert stopped[0].outputs[0].token_ids == ids[: ids.index(ids[4]) + 1]
    assert stopped[0].outputs[0].finish_reason == "stop"
    assert len(ids) == 10


def test_a_stream_grows_and_ends_as_generate_does(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0)
    expected = {output.prompt: output.outputs[0].text for output in llm.generate(PROMPTS, params)}
    seen: dict[str, list[str]] = {prompt: [] for prompt in PROMPTS}
    for state in llm.stream(PROMPTS, params):
        seen[str(state.prompt)].append(state.outputs[0].text)
    for prompt, texts in seen.items():
        assert len(texts) > 5
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert texts[-1] == expected[prompt]


def test_metrics_have_ttft_and_tpot(llm: LLM) -> None:
    metrics = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, temperature=0))[0].metrics
    assert metrics is not None and metrics.ttft is not None and metrics.tpot is not None
    assert 0 < metrics.ttft < 60
    assert metrics.num_generated_tokens == 8


def test_chat_renders_messages_with_the_checkpoints_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "import os"}], SamplingParams(max_tokens=4, temperature=0))
    assert llm.tokenizer is not None
    assert "import os" in llm.tokenizer.decode(list(answer.prompt_token_ids))
    assert len(answer.outputs[0].token_ids) == 4


def test_an_aborted_request_frees_its_blocks_and_leaves_the_others_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0)
    expected = llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    llm.engine.add("stays", PROMPTS[0], tokenizer.encode(PROMPTS[0]), params)
    llm.engine.add("goes", PROMPTS[1], tokenizer.encode(PROMPTS[1]), params)
    for _ in range(3):
        llm.engine.step()
    aborted = llm.engine.abort("goes")
    assert aborted is not None and aborted.outputs[0].finish_reason == "abort"
    done = []
    while llm.engine.has_work:
        done += [output for output in llm.engine.step() if output.finished]
    assert [output.request_id for output in done] == ["stays"]
    assert done[0].outputs[0].token_ids == expected
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.get_num_running() == 0
