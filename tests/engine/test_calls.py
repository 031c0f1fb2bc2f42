"""One `LLM` with several callers: interleaved and dropped streams, nested calls, threads, Ctrl-C, failed steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine.calls import Call
from sageLLM.runtime.engine.interrupts import held_interrupts
from sageLLM.runtime.engine.outputs import CompletionOutput, RequestOutput
from sageLLM.runtime.errors import EngineError, PromptError
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.orders import StepOrder
from sageLLM.runtime.worker.worker import Worker

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
A, B = [10, 11, 12], [20, 21]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm() -> LLM:
    return LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="hybrid"), max_model_len=128)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The LLM of the module; after each test its engine must be idle and consistent."""
    yield shared_llm
    assert not shared_llm.engine.has_work
    shared_llm.engine.scheduler.check_integrity()
    assert shared_llm.engine.scheduler.get_num_running() == shared_llm.engine.scheduler.get_num_waiting() == 0


def tokens(llm: LLM, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    return llm.generate([prompt], greedy(num_tokens))[0].outputs[0].token_ids


def test_interleaved_streams_get_their_own_outputs(llm: LLM) -> None:
    expected = [tokens(llm, A, 5), tokens(llm, B, 5)]
    first, second = llm.stream([A], greedy(5)), llm.stream([B], greedy(5))
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == 5
    assert len({output.request_id for output, _ in pairs}) == len({output.request_id for _, output in pairs}) == 1
    assert [output.outputs[0].token_ids for output in pairs[-1]] == expected


def test_generate_inside_a_stream_takes_nothing_from_it(llm: LLM) -> None:
    expected = tokens(llm, A, 5)
    seen = []
    for output in llm.stream([A], greedy(5)):
        seen.append(output)
        if len(seen) == 1:
            assert len(tokens(llm, B, 8)) == 8
    assert [output.finished for output in seen] == [False, False, False, False, True]
    assert [output.outputs[0].token_ids for output in seen] == [expected[: n + 1] for n in range(5)]


def test_a_closed_stream_costs_no_further_steps(llm: LLM) -> None:
    stream = llm.stream([A, B], greedy(100))
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    before = llm.engine.num_steps
    llm.generate([B], greedy(2))
    assert llm.engine.num_steps - before == 2


def test_an_exception_in_the_consumer_aborts_the_stream(llm: LLM) -> None:
    def consume() -> None:
        for _ in llm.stream([A], greedy(100)):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert not llm.engine.has_work


def test_a_stream_that_was_never_read_queues_nothing(llm: LLM) -> None:
    stream = llm.stream([A], greedy(100))
    assert not llm.engine.has_work
    del stream
    with pytest.raises(PromptError):
        llm.stream([[10**6]], greedy(1))  # the call itself checks the requests


def test_threads_get_the_answers_of_single_calls(llm: LLM) -> None:
    prompts = [[5 + i, 6 + i] for i in range(6)]
    expected = [tokens(llm, prompt, 20) for prompt in prompts]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            found = (
                tokens(llm, prompts[i], 20)
                if i % 2
                else [output.outputs[0].token_ids for output in llm.stream([prompts[i]], greedy(20))][-1]
            )
            if found != expected[i]:
                wrong.append((i, found))
            llm.embed([prompts[i]])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_a_stream_closed_in_another_thread_is_aborted(llm: LLM) -> None:
    stream = llm.stream([A], greedy(100))
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join(60)
    assert not llm.engine.has_work


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's handler of Ctrl-C, which a process started in the background by a shell lacks: it ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_takes_effect_between_steps_and_aborts_the_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm, A, 6)
    run = ModelRunner.run
    pending = [signal.SIGINT]  # one only: a second one, from the step planned ahead, would take effect at once

    def interrupted(*args: object) -> object:
        if pending:
            os.kill(os.getpid(), pending.pop())
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelRunner, "run", interrupted)
    before = llm.engine.num_steps
    with pytest.raises(KeyboardInterrupt):
        llm.generate([A, B], greedy(100))
    monkeypatch.undo()
    assert llm.engine.num_steps == before + 1  # the step was completed
    assert not llm.engine.has_work
    assert tokens(llm, A, 6) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_takes_effect_at_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_takes_effect_at_once_outside_of_a_step() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupts:
        interrupts.release()
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt), held_interrupts(), held_interrupts():
        signal.raise_signal(signal.SIGINT)
        reached.append(3)
    assert reached == [1, 3]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_wait_for_another_thread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread waits for a step of another thread, which does not end before the main thread has given up."""
    run = ModelRunner.run
    is_running, may_end = threading.Event(), threading.Event()

    def slow(*args: object) -> object:
        is_running.set()
        assert may_end.wait(60)
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelRunner, "run", slow)
    found: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: found.append(tokens(llm, A, 4)))
    thread.start()
    assert is_running.wait(60)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        tokens(llm, B, 4)
    may_end.set()
    thread.join(60)
    monkeypatch.undo()
    assert found == [tokens(llm, A, 4)]


def test_an_abort_ends_one_request_with_a_reason(llm: LLM) -> None:
    expected = tokens(llm, B, 6)
    last: dict[str, CompletionOutput] = {}
    for output in llm.stream([A, B], greedy(6)):
        if not last:
            llm.abort(output.request_id)
        last[output.request_id] = output.outputs[0]
    aborted, other = last.values()
    assert (aborted.finish_reason, aborted.stop_reason) == ("abort", "aborted by the caller")
    assert 0 < len(aborted.token_ids) < 6
    assert (other.finish_reason, other.token_ids) == ("length", expected)
    llm.abort("unknown")


def test_a_failed_step_ends_all_calls_and_later_calls_work(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm, A, 6)
    stream = llm.stream([B], greedy(6))
    next(stream)

    def broken(worker: Worker, order: StepOrder) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Worker, "begin", broken)
    with pytest.raises(EngineError, match="OSError: no space left"):
        llm.generate([A], greedy(6))
    monkeypatch.undo()
    with pytest.raises(EngineError, match="no space left"):
        list(stream)  # a step that was in flight may have completed before
    assert tokens(llm, A, 6) == expected


def test_outputs_taken_by_a_direct_step_are_an_error_and_no_hang(llm: LLM) -> None:
    stream = llm.stream([A], greedy(2))
    next(stream)
    llm.engine.step()
    with pytest.raises(EngineError, match=r"direct use of LLM\.engine"):
        next(stream)


def test_a_late_reader_gets_the_newest_output_of_each_request() -> None:
    class Group:
        def __init__(self, request_id: str) -> None:
            self.request_id = request_id

    call = Call([Group("a"), Group("b")], max_queued=10)  # type: ignore[list-item]
    for number in range(100):
        for name in "ab":
            text = CompletionOutput(0, str(number), ())
            call.push(RequestOutput(name, None, (), None, [text], finished=number == 99))
    taken = []
    while (output := call.take()) is not None:
        taken.append(output)
    assert len(taken) < 16
    assert {output.request_id for output in taken if output.finished} == {"a", "b"}
    assert call.is_ended


def test_random_callers_get_right_answers_and_leave_nothing_behind() -> None:
    """Threads that generate, read streams to the end, drop and abort them, and embed, on a pool that preempts."""
    config = PDSchedulerConfig(mode="hybrid", prefill_chunk_size=8)
    llm = LLM(MODEL, dtype="float32", scheduler=config, max_model_len=128, block_size=4, num_kv_blocks=48)
    prompts = [[5 + i, 6 + i, 7 + i] for i in range(6)]
    expected = [tokens(llm, prompt, 24) for prompt in prompts]
    wrong: list[object] = []

    def act(random: Random) -> None:
        i, num_tokens = random.randrange(len(prompts)), random.randrange(1, 25)
        match random.randrange(4):
            case 0:
                found = tokens(llm, prompts[i], num_tokens)
                if found != expected[i][:num_tokens]:
                    wrong.append((i, found))
            case 1:
                stream = llm.stream([prompts[i], prompts[i - 1]], greedy(num_tokens))
                next(stream)
            case 2:
                for output in llm.stream([prompts[i]], greedy(num_tokens)):
                    if random.random() < 0.2:
                        llm.abort(output.request_id)
                    if output.outputs[0].token_ids != expected[i][: len(output.outputs[0].token_ids)]:
                        wrong.append((i, output))
            case _:
                llm.embed([prompts[i]])

    def work(seed: int) -> None:
        random = Random(seed)
        try:
            for _ in range(15):
                act(random)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    assert not llm.engine.has_work
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.get_stats()["kv_blocks_used"] == 0
