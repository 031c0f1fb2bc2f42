"""Workers in processes: answers equal those of one process, and lost workers cost no request."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import CheckpointError, EngineError, SageError
from sageLLM.runtime.loader.model import load_model
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.worker import rank_processes
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.fork_server import ForkServer
from sageLLM.runtime.worker.process_executor import ProcessExecutor
from sageLLM.runtime.worker.worker_process import WORKERS, ForkServerClient

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
SPEC = WorkerSpec(str(MODEL), "float32", "cpu", "auto", 128, KVBudget(8), is_split=False)
PROMPTS = [[10, 11, 12], [20, 21], [30 + i for i in range(40)], [10, 11, 13], [40, 41]]
LIST = r"\[([0-9]{1,3}, ){8}true\]"
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=24, n=2, temperature=1.0, seed=3, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, seed=4, prompt_logprobs=1, stop=["self"], min_tokens=4),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=5, presence_penalty=0.5, logit_bias={7: 1.0}),
    SamplingParams(max_tokens=40, temperature=1.0, seed=6, structured_outputs=StructuredOutputsParams(regex=LIST)),
]


def load(mode: str = "hybrid", **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)
    return LLM(MODEL, dtype="float32", max_model_len=128, scheduler=config, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    found = load().generate(PROMPTS, PARAMS)
    assert re.fullmatch(LIST, found[-1].outputs[0].text), "the last request has a grammar"
    return found


@pytest.fixture(scope="module")
def one_rank() -> Iterator[LLM]:
    llm = load(distributed_executor_backend="mp")
    yield llm
    ids = process_ids(llm)
    llm.close()
    assert_ended(ids)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[LLM]:
    llm = load(tensor_parallel_size=2)
    yield llm
    ids = process_ids(llm)
    llm.close()
    assert_ended(ids)


def process_ids(llm: LLM) -> list[int]:
    executor = llm.engine.executor
    assert isinstance(executor, ProcessExecutor)
    return executor.process_ids


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process_id}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def assert_ended(ids: list[int], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_running, ids)):
        assert time.monotonic() < deadline, f"worker processes {ids} are left"
        time.sleep(0.05)


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert tokens(found) == tokens(expected)
    for output, other in zip(found, expected, strict=True):
        for answer, wanted in zip(output.outputs, other.outputs, strict=True):
            assert (answer.text, answer.finish_reason) == (wanted.text, wanted.finish_reason)
            assert answer.cumulative_logprob == pytest.approx(wanted.cumulative_logprob, abs=1e-3)
        assert (output.prompt_logprobs is None) == (other.prompt_logprobs is None)


def test_one_worker_process_gives_the_same_answers(one_rank: LLM, expected: list[RequestOutput]) -> None:
    assert_same(one_rank.generate(PROMPTS, PARAMS), expected)


def test_two_ranks_give_the_same_answers(two_ranks: LLM, expected: list[RequestOutput]) -> None:
    assert_same(two_ranks.generate(PROMPTS, PARAMS), expected)


def test_a_vocabulary_that_is_not_divided_is_padded(make_checkpoint: Callable[..., Path]) -> None:
    """199 tokens over two ranks: 128 rows each, of which the second has 71 tokens."""
    folder = make_checkpoint("Llama", tie_word_embeddings=True)
    prompts = [[198, 5, 7], [100, 127, 128, 3]]
    params = [PARAMS[0], SamplingParams(max_tokens=12, temperature=1.0, seed=3, prompt_logprobs=1, ignore_eos=True)]
    alone = LLM(folder, dtype="float32", skip_tokenizer=True).generate(prompts, params)
    llm = LLM(folder, dtype="float32", skip_tokenizer=True, tensor_parallel_size=2)
    try:
        assert tokens(llm.generate(prompts, params)) == tokens(alone)
    finally:
        llm.close()


def test_two_ranks_in_strict_mode_with_swapping(expected: list[RequestOutput]) -> None:
    llm = load("strict", tensor_parallel_size=2, swap_space=0.01)
    assert_same(llm.generate(PROMPTS, PARAMS), expected)
    ids = process_ids(llm)
    del llm
    assert_ended(ids)


def after_tokens(llm: LLM, num: int, action: Callable[[], object]) -> list[RequestOutput]:
    """Streams the prompts, and acts once after `num` outputs."""
    last: dict[str, RequestOutput] = {}
    for count, output in enumerate(llm.stream(PROMPTS, PARAMS)):
        if count == num:
            action()
        last[output.request_id] = output
    return list(last.values())


@pytest.mark.parametrize(("rank", "num"), [(0, 1), (1, 30)])
def test_a_killed_rank_costs_no_request(two_ranks: LLM, expected: list[RequestOutput], rank: int, num: int) -> None:
    before = process_ids(two_ranks)
    found = after_tokens(two_ranks, num, lambda: os.kill(before[rank], signal.SIGKILL))
    assert_same(found, expected)
    assert not set(before) & set(process_ids(two_ranks))
    assert_ended(before)
    two_ranks.engine.scheduler.check_integrity()
    assert two_ranks.engine.scheduler.get_stats()["kv_blocks_used"] == 0


def test_a_rank_without_memory_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """Its address space cannot grow any more, and then a step requires a larger arena."""
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer": True}
    prompts = [[10 + i + j % 50 for j in range(400)] for i in range(8)]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    expected = LLM(MODEL, **options).generate(prompts, params)
    llm = LLM(MODEL, tensor_parallel_size=2, **options)
    llm.generate([prompt[:3] for prompt in prompts[:2]], params)
    rank = process_ids(llm)[0]
    status = Path(f"/proc/{rank}/status").read_text()
    num_bytes = 1024 * int(status.partition("VmSize:")[2].split()[0])
    resource.prlimit(rank, resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))
    assert tokens(llm.generate(prompts, params)) == tokens(expected)
    assert "rank 0 failed: out of memory; lower max_num_batched_tokens or num_kv_blocks" in caplog.text
    ids = process_ids(llm)
    assert rank not in ids
    llm.close()
    assert_ended([rank, *ids])


def test_a_worker_that_hangs_is_replaced(one_rank: LLM, expected: list[RequestOutput]) -> None:
    executor = one_rank.engine.executor
    assert isinstance(executor, ProcessExecutor)
    executor.step_seconds = 2.0
    before = process_ids(one_rank)
    restart = executor.restart

    def restarted() -> None:
        executor.step_seconds = 300.0  # the new worker may be slow on a loaded machine
        restart()

    executor.restart = restarted  # type: ignore[method-assign]
    found = after_tokens(one_rank, 5, lambda: os.kill(before[0], signal.SIGSTOP))
    executor.restart = restart  # type: ignore[method-assign]
    assert_same(found, expected)
    assert_ended(before)


def test_a_killed_fork_server_costs_no_request(one_rank: LLM, expected: list[RequestOutput]) -> None:
    """Its workers end with it. It has one thread, so no lock was held when it forked."""
    server, before = WORKERS.process_id, process_ids(one_rank)
    assert server is not None
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
    os.kill(server, signal.SIGKILL)
    assert_ended(before)
    assert_same(one_rank.generate(PROMPTS, PARAMS), expected)
    assert WORKERS.process_id != server


def test_a_stopped_fork_server_is_replaced(one_rank: LLM, expected: list[RequestOutput]) -> None:
    """It neither starts workers nor tells how one has ended."""
    server, before = WORKERS.process_id, process_ids(one_rank)
    assert server is not None and WORKERS._requests is not None
    WORKERS._requests.settimeout(2.0)
    os.kill(server, signal.SIGSTOP)
    os.kill(before[0], signal.SIGKILL)
    assert_same(one_rank.generate(PROMPTS, PARAMS), expected)
    assert WORKERS.process_id != server


def test_a_start_without_free_descriptors_costs_no_other_worker(
    one_rank: LLM, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork server is well, and with it the workers of other engines would end."""

    def no_pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = WORKERS.process_id, process_ids(one_rank)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe", no_pipe)
        with pytest.raises(EngineError, match="a worker process cannot be started: Too many open files"):
            WORKERS.start(SPEC, rank_processes.WORKER, 1, {})
    assert_same(one_rank.generate(PROMPTS, PARAMS), expected)
    assert before == (WORKERS.process_id, process_ids(one_rank))


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_fork_server_without_free_processes_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    ours, theirs = socket.socketpair()
    client, server = ForkServerClient(), ForkServer.__new__(ForkServer)
    client._owner, client._requests = os.getpid(), ours
    server._requests, server._exit_pipes = theirs, {}
    monkeypatch.setattr(os, "fork", no_fork)
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        served = pool.submit(server.serve)
        before = num_descriptors()
        with pytest.raises(EngineError, match="a worker process cannot be started: Resource temporarily unavailable"):
            client.start(SPEC, rank_processes.WORKER, 1, {})
        assert served.result() and client._requests is ours
        assert num_descriptors() == before


def test_a_request_that_kills_every_worker_is_ended(
    one_rank: LLM, expected: list[RequestOutput], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker dies whenever it computes a prompt that begins with 77."""
    executor = one_rank.engine.executor
    assert isinstance(executor, ProcessExecutor)
    submit = executor.submit

    def poisoned(order: Any) -> Any:
        future = submit(order)
        parts = [part for part in (order.decode, order.prefill) if part is not None]
        if any(new.prompt_token_ids[0] == 77 for part in parts for new in part.new):
            os.kill(executor.process_ids[0], signal.SIGKILL)
        return future

    executor.submit = poisoned  # type: ignore[method-assign]
    outputs = one_rank.generate([[77, 5], *PROMPTS], [PARAMS[0], *PARAMS])
    executor.submit = submit  # type: ignore[method-assign]
    answer = outputs[0].outputs[0]
    assert answer.finish_reason == "abort"
    assert str(answer.stop_reason).startswith("the workers were lost 3 times while they computed this request: rank 0")


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from sageLLM import LLM\n"
        f"llm = LLM({str(MODEL)!r}, dtype='float32', tensor_parallel_size=2, skip_tokenizer=True)\n"
        "print(*llm.engine.executor.process_ids, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        ids = [int(text) for text in parent.stdout.readline().split()]
        assert len(ids) == 2 and all(map(is_running, ids))
        parent.kill()
    assert_ended(ids)
    assert not list(tmp_path.iterdir()), "temporary files are left"


def test_nothing_is_left_of_a_start_that_is_killed(tmp_path: Path) -> None:
    """The engine is killed when it has started its ranks, which then wait for each other."""
    script = (
        "import os; from sageLLM import LLM; from sageLLM.runtime.worker import process_executor\n"
        "def kill(rank, deadline): os.kill(os.getpid(), 9)\n"
        "process_executor.await_ready = kill\n"
        f"LLM({str(MODEL)!r}, dtype='float32', tensor_parallel_size=2, skip_tokenizer=True)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir()), "temporary files are left"


def test_a_worker_ends_if_its_parent_died_before_it_began_to_watch() -> None:
    """While it waits for other ranks, which have not started and never will."""
    script = (
        "import socket, subprocess, time, types; from sageLLM.runtime.worker import process\n"
        "process.join_ranks = lambda spec: time.sleep(600)\n"
        "ended = subprocess.Popen(['true']); ended.wait(); ours, theirs = socket.socketpair()\n"
        "process.run(types.SimpleNamespace(cores=[]), theirs.detach(), ended.pid)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 1


def test_errors_of_arguments() -> None:
    with pytest.raises(CheckpointError, match="tensor_parallel_size=3 does not divide"):
        load(tensor_parallel_size=3)
    with pytest.raises(CheckpointError, match="enable_expert_parallel requires a model with experts, got llama"):
        load(tensor_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(CheckpointError, match=r"^af='A:Fx3' does not divide "):
        cpu = torch.device("cpu")
        load_model(MODEL, load_registry(()), dtype="auto", device=cpu, max_model_len=None, tp=3, role="ffn")
    with pytest.raises(SageError, match="tensor_parallel_size must be an integer of at least 1, got 0"):
        load(tensor_parallel_size=0)
    with pytest.raises(SageError, match="must be 'mp' for 2 ranks, got 'uni'"):
        load(tensor_parallel_size=2, distributed_executor_backend="uni")
    with pytest.raises(SageError, match="must be 'uni', 'mp' or None, got 'ray'"):
        load(distributed_executor_backend="ray")


def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_processes, "WORKER", "this.package.does.not.exist")
    with pytest.raises(EngineError, match=r"rank 0 \(process \d+\) exited with code 1"):
        load(distributed_executor_backend="mp")


def test_a_worker_without_memory_for_the_kv_cache() -> None:
    with pytest.raises(SageError, match="the KV cache of 100000000000 blocks of 16 tokens must fit in memory"):
        load(distributed_executor_backend="mp", num_kv_blocks=10**11)


def test_embedding_needs_the_model_in_this_process(one_rank: LLM) -> None:
    with pytest.raises(SageError, match="distributed_executor_backend='uni'"):
        one_rank.embed([[1, 2]])


def test_threads_share_worker_processes(one_rank: LLM, expected: list[RequestOutput]) -> None:
    found: dict[int, list[RequestOutput]] = {}

    def ask(i: int) -> None:
        found[i] = one_rank.generate(PROMPTS, PARAMS)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for outputs in found.values():
        assert_same(outputs, expected)
    assert len(found) == 3
