"""Tests of the engine options: one definition for every command, equal to the arguments of `LLM`."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT
from typer.testing import CliRunner

from sageLLM.runtime.cli import engine_options
from sageLLM.runtime.cli.engine_options import EngineOptions, parse_count
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.engine.combinations import ANY, COMBINATIONS, MODE, Combination, as_table, problems
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.engine.options import LLMOptions
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.worker.build import WorkerSpec

BY_COMMAND = {"self", "model", "skip_tokenizer"}
"""Arguments of `LLM` that a command decides itself."""


def test_every_argument_of_llm_is_an_option_with_the_same_default() -> None:
    parameters = inspect.signature(LLM.__init__).parameters
    arguments = EngineOptions().arguments()
    assert {*arguments} == {*parameters} - BY_COMMAND
    assert arguments.pop("scheduler") == PDSchedulerConfig(mode="hybrid")
    assert arguments.pop("objective") == ServiceObjective()
    for name, value in arguments.items():
        default = parameters[name].default
        assert value == (list(default) if default == () else default), name


def test_the_record_of_the_options_has_the_parameters_of_llm() -> None:
    parameters = dict(inspect.signature(LLM.__init__).parameters)
    for name in ("self", "model"):
        del parameters[name]
    assert {option.name: option.default for option in fields(LLMOptions)} == {
        name: one.default for name, one in parameters.items()
    }


def test_workers_get_the_options_of_the_same_names() -> None:
    same = {option.name for option in fields(LLMOptions)} & set(WorkerSpec.__struct_fields__)
    assert same >= {"device", "dtype", "kernels", "kv_tier", "num_ubatches", "overlap_transfers", "enforce_eager"}


@pytest.mark.parametrize("one", COMBINATIONS, ids=lambda one: f"{one.option}-{one.other}")
def test_the_table_of_combinations_decides(one: Combination) -> None:
    """Each entry is violated by a setting of its own options, and the message names both and the reason."""
    values: dict[str, Any] = {option.name: option.default for option in fields(LLMOptions)} | {MODE: "strict"}
    assert list(problems(values)) == []
    values[one.option] = "set"
    if one.needs is None:
        values[one.other] = one.excluded or 2
    elif one.needs != ANY:
        values[one.other] = "cuda:1" if one.other == "device" else "other"
    (found,) = [text for text in problems(values) if f"{one.option} " in text and f" {one.other}" in text]
    assert found.endswith(f": {one.why}")
    if one.needs not in (None, ANY):
        assert one.problem(values | {one.other: one.needs}) is None


def test_the_table_of_combinations_is_in_the_docs() -> None:
    assert as_table() in (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


def test_the_command_line_reads_the_table() -> None:
    done = CliRunner().invoke(app, ["run", "nowhere", "--prompt", "a", "--weights-budget", "2"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: weights_budget requires weights_tier 'disk', got 'device': ")


def test_options_of_the_scheduler_reach_its_config() -> None:
    options = EngineOptions(
        pd="time_share", max_num_seqs=8, max_num_batched_tokens=100, prefill_chunk_size=64, scheduling_policy="fcfs"
    )
    config = options.scheduler()
    assert (config.mode, config.max_decode_batch_size, config.max_prefill_batch_size) == ("time_share", 8, 8)
    assert (config.max_prefill_tokens, config.prefill_chunk_size, config.policy) == (100, 64, "fcfs")
    with pytest.raises(SageError, match="prefill_chunk_size must be at least 1, got 0"):
        EngineOptions(prefill_chunk_size=0).arguments()
    with pytest.raises(SageError, match="ttft_s must be a positive number of seconds, got 0"):
        EngineOptions(slo_ttft=0).arguments()


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("32k", 32000), ("32K", 32768), ("1.5M", 1572864)])
def test_counts_have_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "4.5", "many", "1e999k"])
def test_other_texts_are_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number such as 4096, 32k or 32K, got"):
        parse_count(text)


def test_the_options_of_the_command_line_reach_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineOptions] = []

    def load(options: EngineOptions, model: Path) -> None:
        seen.append(options)
        raise SageError("stop here")

    monkeypatch.setattr(engine_options.EngineOptions, "load", load)
    given = {
        "device": "cuda",
        "dtype": "float16",
        "kernels": "reference",
        "pd": "auto",
        "max-model-len": "32k",
        "max-num-seqs": "9",
        "max-num-batched-tokens": "1k",
        "prefill-chunk-size": "77",
        "scheduling-policy": "deadline",
        "slo-ttft": "2",
        "slo-tpot": "3",
        "block-size": "32",
        "num-kv-blocks": "40",
        "kv-cache-dtype": "fp8",
        "activation-dtype": "int8",
        "gpu-memory-utilization": "0.8",
        "swap-space": "1",
        "disk-space": "2",
        "disk-folder": "/tmp/a",
        "kv-tier": "disk",
        "kv-tier-space": "5",
        "weights-tier": "disk",
        "weights-budget": "3",
        "weights-folder": "/tmp/b",
        "generation-config": "vllm",
        "tensor-parallel-size": "2",
        "pipeline-parallel-size": "2",
        "pp-layer-partition": "2,2",
        "nnodes": "2",
        "node-rank": "0",
        "master-addr": "127.0.0.1",
        "master-port": "29502",
        "af": "2:1",
        "distributed-executor-backend": "mp",
        "num-ubatches": "2",
        "prefill-workers": "1",
        "decode-workers": "2",
        "prefill-tensor-parallel-size": "2",
        "decode-tensor-parallel-size": "4",
        "decode-block-size": "8",
        "kv-transport": "tcp",
        "kv-load-failure-policy": "fail",
        "kv-events-config": "{}",
        "plugin": "mine",
        "disable-passes": "a,b",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    switches = [
        "--no-enable-prefix-caching",
        "--no-async-scheduling",
        "--overlap-transfers",
        "--enable-expert-parallel",
        "--enforce-eager",
    ]
    done = CliRunner().invoke(app, ["run", "folder", "--prompt", "a", *flags, *switches])
    assert (done.exit_code, done.stderr) == (1, "error: stop here\n")
    (options,) = seen
    default = EngineOptions()
    unchanged = [one.name for one in fields(options) if getattr(options, one.name) == getattr(default, one.name)]
    assert unchanged == []
    assert (options.max_model_len, options.plugins, options.disable_passes) == (32000, [Path("mine")], "a,b")
    assert CliRunner().invoke(app, ["embed", "folder", "--prompt", "a", "--dtype", "float32"]).exit_code == 1
    assert seen[1] == EngineOptions(dtype="float32")
    done = CliRunner().invoke(app, ["run", "folder", "--prompt", "a", "--max-num-seqs", "9x"])
    assert (done.exit_code, "expected a number such as 4096" in done.stderr) == (2, True)
