"""LLM(kernels=...): explicit choices, the default for a device, and the fallback without a compiler."""

import logging
from pathlib import Path

import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor import kernel_choice, planner
from sageLLM.runtime.kernels.cpu.compiler import CompileError, find_compiler
from sageLLM.runtime.kernels.cpu.packing import PackedWeight

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
    expected: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING, logger="sagellm"):
        llm = LLM(MODEL, dtype="float32", skip_tokenizer=True)
        assert tokens(llm) == expected
    check_fallback(llm, caplog, "no C++ compiler found")


def check_fallback(llm: LLM, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    (message,) = [record.getMessage() for record in caplog.records if record.name == "sagellm"]
    assert reason in message
    assert llm.compiler.planner.name == "reference"
    assert all(stats.num_native == 0 for stats in llm.kernel_stats())


@pytest.mark.parametrize(
    ("settings", "commands", "reason"),
    [
        ({"SAGELLM_CACHE_DIR": "/dev/null"}, "", "cannot use the kernel cache: "),
        ({"SAGELLM_COMPILE_TIMEOUT": "0.5"}, "sleep 60", "was stopped after 0.5 s"),
        ({}, 'while test "$1" != -o; do shift; done; echo text > "$2"', "cannot load "),
        ({}, "exit 1", "could not build "),
    ],
)
def test_kernels_that_cannot_be_made_are_no_error(
    expected: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    settings: dict[str, str], commands: str, reason: str,
) -> None:  # fmt: skip
    script = tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\nif test "$1" = --version; then echo 1.0; exit; fi\n{commands}\n')
    script.chmod(0o755)
    for name, value in {"SAGELLM_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(script), **settings}.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, logger="sagellm"):
        llm = LLM(MODEL, dtype="float32", skip_tokenizer=True)
        assert tokens(llm) == expected
    check_fallback(llm, caplog, reason)


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_cached_kernels_run_without_a_compiler(
    expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    LLM(MODEL, dtype="float32", kernels="cpu", skip_tokenizer=True)
    monkeypatch.setattr(kernel_choice, "find_compiler", lambda: None)
    llm = LLM(MODEL, dtype="float32", kernels="cpu", skip_tokenizer=True)
    assert tokens(llm) == expected and llm.compiler.planner.name == "cpu"
    assert not caplog.records


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_a_failure_after_packing_falls_back_with_unpacked_weights(
    expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CompileError("no space left")

    monkeypatch.setattr(planner, "NativePlan", fail)
    llm = LLM(MODEL, dtype="float32", kernels="cpu", skip_tokenizer=True)
    assert any(isinstance(weight, PackedWeight) for weight in llm.model.weights.values())
    assert tokens(llm) == expected
    check_fallback(llm, caplog, "no space left")


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
