"""LLM(kernels=...): explicit choices, the default for a device, and the fallback without a compiler."""

import logging
from pathlib import Path

import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor import kernel_choice
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PROMPTS = [[5, 7, 11], [31, 8], [40, 41, 42, 43, 44]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return tokens(LLM(MODEL, dtype="float32", kernels="reference", skip_tokenizer=True))


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_native_kernels_produce_the_tokens_of_the_references(expected: list[tuple[int, ...]]) -> None:
    llm = LLM(MODEL, dtype="float32", kernels="cpu", skip_tokenizer=True)
    assert tokens(llm) == expected
    assert [stats.num_native > 0 for stats in llm.kernel_stats()] == [True, True]


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_do_not_depend_on_the_batch(dtype: str) -> None:
    together = LLM(MODEL, dtype=dtype, kernels="cpu", skip_tokenizer=True)
    alone = LLM(MODEL, dtype=dtype, kernels="cpu", skip_tokenizer=True, enable_prefix_caching=False)
    assert tokens(together) == [tokens(alone, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_answers_do_not_depend_on_the_number_of_threads() -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            llm = LLM(MODEL, dtype="bfloat16", kernels="cpu", skip_tokenizer=True)
            found.append([(o.outputs, o.prompt_logprobs) for o in llm.generate([*PROMPTS, [*range(9, 200)]], params)])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_without_a_compiler_the_references_run_with_one_warning(
    expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_choice, "find_compiler", lambda: None)
    llm = LLM(MODEL, dtype="float32", skip_tokenizer=True)
    with caplog.at_level(logging.WARNING, logger="sagellm"):
        assert tokens(llm) == expected
    (message,) = [record.getMessage() for record in caplog.records if record.name == "sagellm"]
    assert "no C++ compiler found" in message
    assert llm.compiler.planner.name == "reference"
    assert all(stats.num_native == 0 for stats in llm.kernel_stats())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", "kernels must be one of auto, reference, cpu, triton, got 'fast'"),
        ("triton", "kernels must not be 'triton' here: "),
    ],
)
def test_an_invalid_choice_is_an_error(choice: str, message: str) -> None:
    with pytest.raises(SageError, match=message):
        LLM(MODEL, kernels=choice, skip_tokenizer=True)  # type: ignore[arg-type]
