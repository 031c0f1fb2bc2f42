"""Damaged checkpoints, invalid arguments and invalid requests through the public `LLM`: the exact messages."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM import LLM, SamplingParams
from sageLLM.codegen import driver
from sageLLM.generated.builders import MODELS
from sageLLM.generated.passes import PASSES
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.errors import (
    CheckpointError,
    PluginError,
    PromptError,
    SageError,
    SamplingParamsError,
    TokenizerError,
)
from sageLLM.runtime.loader.tables import ROWS_AT_ONCE

MakeCheckpoint = Callable[..., Path]
ONE_LAYER = {"num_hidden_layers": 1, "max_position_embeddings": 64}
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a valid checkpoint, to be damaged."""
    return Path(shutil.copytree(make_checkpoint("Llama", **ONE_LAYER), tmp_path / "model"))


@pytest.fixture
def llm(make_checkpoint: MakeCheckpoint) -> LLM:
    return LLM(make_checkpoint("Llama", **ONE_LAYER), skip_tokenizer=True)


def resident_bytes() -> int:
    """The memory of this process that has pages."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, kind: type[SageError] = CheckpointError, **arguments: Any) -> str:
    with pytest.raises(SageError) as caught:
        LLM(folder, **{"skip_tokenizer": True} | arguments)
    assert type(caught.value) is kind
    return str(caught.value)


# config.json


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert (
        refusal(folder)
        == f"expected config.json in {folder}; pass the folder of a Hugging Face checkpoint, or a GGUF file"
    )
    missing = folder / "elsewhere"
    message = f"{missing} is not a folder; pass the folder of a Hugging Face checkpoint, or a GGUF file"
    assert refusal(missing) == refusal(missing, skip_tokenizer=False) == message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{'a': 1}", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); "),
        ("", "is not JSON: Expecting value: line 1 column 1 (char 0); "),
    ],
)
def test_config_that_is_not_json(text: str, why: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder) == f"{folder / 'config.json'} {why}download it again"


@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors"])
def test_a_fifo_or_device_in_the_place_of_a_file(name: str, folder: Path) -> None:
    """Reading one would wait for a writer, or never end."""
    (folder / name).unlink(missing_ok=True)
    missing = f"{folder} has neither model.safetensors nor model.safetensors.index.json; found model.safetensors"
    os.mkfifo(folder / name)
    assert refusal(folder) == (f"{folder / name} must be a regular file, got a FIFO" if "json" in name else missing)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert refusal(folder) == (f"{folder / name} must be a regular file, got a device" if "json" in name else missing)


def test_a_config_of_a_hundred_megabytes(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(100_000_000)
    assert refusal(folder) == f"{folder / 'config.json'} must have at most 4194304 bytes, got 100000000"


@pytest.mark.parametrize("outside", ["/etc", "../other", "1_Pooling/../..", "C:\\x", "..\\x", 7])
def test_a_module_outside_the_folder(outside: Any, folder: Path) -> None:
    modules = [{"type": "Transformer", "path": ""}, {"type": "sentence_transformers.models.Pooling", "path": outside}]
    (folder / "modules.json").write_text(json.dumps(modules))
    shown = outside if isinstance(outside, int) else f"'{outside}'"
    assert refusal(folder) == (
        f"{folder / 'modules.json'}: the path of a module must be a folder inside {folder}, got {shown}"
    )


@pytest.mark.parametrize("num_kv_blocks", [64, None])
def test_sixteen_million_positions_take_the_memory_of_those_in_use(num_kv_blocks: int | None, folder: Path) -> None:
    edit_config(folder, max_position_embeddings=2**24)
    before = resident_bytes()
    llm = LLM(folder, skip_tokenizer=True, num_kv_blocks=num_kv_blocks)
    assert llm.model.max_model_len == 2**24
    assert len(llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 3
    assert llm.model.tables.num_filled == ROWS_AT_ONCE
    assert resident_bytes() - before < 100 * 2**20, "the tables of all positions have 1 GiB"


def test_a_kv_cache_that_does_not_fit_the_memory(folder: Path) -> None:
    with pytest.raises(SageError, match=r"the KV cache of 1000000000000 blocks of 16 tokens must fit in memory, got"):
        LLM(folder, skip_tokenizer=True, num_kv_blocks=10**12)


@pytest.mark.parametrize("key", ["architectures", "dtype", "hidden_size", "rope_parameters"])
def test_escape_sequences_in_values_are_not_printed(key: str, folder: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e\r\n\ud800"
    edit_config(folder, **{key: [evil] if key == "architectures" else {"rope_type": evil} if "rope" in key else evil})
    message = refusal(folder)
    assert "\\x1b]0;owned\\x07\\u202e\\r" in message
    assert all(char.isprintable() or char == "\n" for char in message)


def test_config_nested_beyond_reason(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)
    assert refusal(folder).startswith(f"{folder / 'config.json'} is not JSON: maximum recursion depth exceeded")


def test_config_that_is_a_list_or_a_folder(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text("[1]")
    assert refusal(folder) == f"{path} must hold a JSON object, got a list"
    path.unlink()
    path.mkdir()
    assert refusal(folder) == f"{path} cannot be read: Is a directory"


KNOWN = sorted({name for layout in MODELS.values() for name in layout.architectures})
HOW = "To add one: `sagellm new model NAME`, which prints the next step (docs/add-a-model.md)"
ADD_ONE = f"known are {', '.join(KNOWN)}. {HOW}"
MISTRAL = {"architectures": ["MistralForCausalLM"]}
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["NobodysModel"]}, f"expected an architecture with a layout, got NobodysModel; {ADD_ONE}"),
    ({"architectures": None}, f"expected an architecture with a layout, got none; {ADD_ONE}"),
    ({"architectures": {"a": 1}}, f"expected an architecture with a layout, got none; {ADD_ONE}"),
    ({"hidden_size": None}, "'hidden_size': expected an integer, got null"),
    ({"hidden_size": "64"}, "'hidden_size': expected an integer, got '64'"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers': expected a size of 1 to 2147483647, got 0"),
    ({"num_attention_heads": True}, "'num_attention_heads': expected an integer, got true"),
    (
        {"num_key_value_heads": 3},
        "requires num_attention_heads % num_key_value_heads == 0, "
        "but num_attention_heads is 4, num_key_value_heads is 3",
    ),
    ({"rms_norm_eps": [1]}, "'rms_norm_eps': expected a finite number, got a list"),
    ({"rms_norm_eps": -1e-6}, "requires rms_norm_eps >= 0, but rms_norm_eps is -1e-06"),
    ({**MISTRAL, "sliding_window": 0}, "requires sliding_window >= 1, but sliding_window is 0"),
    ({**MISTRAL, "sliding_window": -5}, "requires sliding_window >= 1, but sliding_window is -5"),
    ({"rms_norm_eps": 10**400}, f"'rms_norm_eps': expected a finite number, got 1{'0' * 39}"),
    ({"rope_parameters": [1]}, "'rope_parameters': expected an object, got a list"),
    (
        {"rope_parameters": {"rope_type": "su", "factor": 2.0}},
        "rope scaling 'su' is not supported; known are default, linear, dynamic, yarn, llama3, longrope",
    ),
    (
        {"rope_parameters": {"rope_type": ["linear"]}},
        "the type of the rope scaling must be text, got a list",
    ),
    (
        {"rope_parameters": {"rope_type": "linear"}},
        "'factor' of rope scaling 'linear' must be a positive number, got nothing",
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        "'factor' of rope scaling 'linear' must be a positive number, got 'two'",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}},
        "'short_factor' of rope scaling 'longrope' must be a list of 8 numbers, got 7",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7 + [None], "long_factor": [1.0] * 8}},
        "short_factor[7] of rope scaling 'longrope' must be a positive number, got nothing",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
        "the base frequency of the rotation must be positive, got -1",
    ),
    ({"max_position_embeddings": 2**31 - 1}, "the model's positions must be from 2 to 16777216, got 2147483647"),
    (
        {"dtype": "int4"},
        "'dtype' must be one of float32, bfloat16, float16, got 'int4'; choose one with dtype=",
    ),
    (
        {"dtype": None, "torch_dtype": {"a": 1}},
        "'torch_dtype' must be one of float32, bfloat16, float16, got an object; choose one with dtype=",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=[str(changes)[:50] for changes, _ in BAD_CONFIGS])
def test_config_that_cannot_be_used(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_config(folder, **changes)
    assert refusal(folder) == f"{folder / 'config.json'}: {message}"


VALUES: list[Any] = [
    *(None, True, False, "", "64", "x" * 500, [], [1], [None, {}], {}, {"a": {"b": []}}),
    *(0, 1, 3, -1, 128, 2**31 - 1, 2**31, 2**40, 10**30, -(10**30), 10**400),
    *(0.5, 7.0, 1e308, -1e308, 1e-320, float("nan"), float("inf")),
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
     "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 2.0,
     "original_max_position_embeddings": 32},
]  # fmt: skip


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The config with one to three values replaced or removed, half of them in the rope section."""
    config = json.loads(json.dumps(config))
    config["rope_parameters"] = {"rope_theta": 10000.0, **rng.choice(ROPES)}
    for _ in range(rng.randint(1, 3)):
        section = config
        if rng.random() < 0.5 and isinstance(config.get("rope_parameters"), dict) and config["rope_parameters"]:
            section = config["rope_parameters"]
        key = rng.choice([*section, "head_dim", "sliding_window", "rope_scaling"])
        if rng.random() < 0.1:
            section.pop(key, None)
        else:
            section[key] = rng.choice(VALUES)
    return config


def test_five_hundred_damaged_configs_are_served_or_rejected_with_a_message(folder: Path) -> None:
    """Only SageError is raised, and a huge number neither exhausts the memory nor takes forever."""
    rng = random.Random(0)
    sound = json.loads((folder / "config.json").read_text())
    num_refused = 0
    for _ in range(500):
        config = mutated(sound, rng)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            LLM(folder, skip_tokenizer=True)
        except SageError as error:
            num_refused += 1
            assert str(folder) in str(error), config
        except Exception as error:
            pytest.fail(f"{type(error).__name__} ({error}) for {config}")
    assert 200 < num_refused < 500


# tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def misfit(folder: Path, *problems: str) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{folder} does not match the layout 'llama' (specs/models/llama.yaml: llama):{lines}"


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(Q_PROJ))
    problem = f"missing tensor '{Q_PROJ}' [64, 64], which fills layers.0.attention.wqkv"
    assert refusal(folder) == misfit(folder, problem)


def test_an_unused_tensor_with_escape_sequences_or_without_end(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"\x1b[2J\n": torch.ones(2)}))
    assert refusal(folder) == misfit(folder, "tensor '\\x1b[2J\\n' [2] is unused by the layout")
    edit_tensors(folder, lambda tensors: (tensors.popitem(), tensors.update({"x" * 100_000: torch.ones(2)})))
    assert len(refusal(folder)) < 2000


def test_a_hundred_thousand_empty_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"e{i}": torch.ones(0) for i in range(100_000)}))
    assert refusal(folder).endswith("and at least 980 more")


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.bool])
def test_weights_that_are_integers(dtype: torch.dtype, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    assert "is quantised" in refusal(folder)


def test_an_unused_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.extra": torch.ones(2, 3)}))
    assert refusal(folder) == misfit(folder, "tensor 'model.extra' [2, 3] is unused by the layout")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    assert refusal(folder) == misfit(folder, "tensor 'model.norm.weight': expected [64] for norm, got [63]")


def test_a_config_that_claims_more_layers_than_there_are(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2**31 - 1)
    lines = refusal(folder).splitlines()
    assert lines[0] == misfit(folder)
    assert lines[1] == "  missing tensor 'model.layers.1.input_layernorm.weight' [64], which fills layers.1.attn_norm"
    assert lines[21:] == ["  and at least 980 more"]


def test_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        f"{folder} has only pickled weights (pytorch_model.bin), which can run code when loaded; convert them once "
        "with transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
    )


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder} has neither model.safetensors nor model.safetensors.index.json"


def test_a_file_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    assert refusal(folder) == (
        f"{path} is damaged: it is cut off after {len(data) - 5} of {len(data)} bytes; download it again"
    )


def test_an_index_without_one_of_its_shards(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sharded = make_checkpoint("Llama", max_shard_size="40KB", **ONE_LAYER)
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    index = folder / "model.safetensors.index.json"
    assert refusal(folder) == f"{index} lists the file '{shard.name}', which is missing; download it again"


def test_a_rejected_checkpoint_leaves_no_state(folder: Path) -> None:
    """The same folder is served in the same process once it is repaired."""
    sound = (folder / "config.json").read_text()
    edit_config(folder, vocab_size=200)
    embed = "tensor 'model.embed_tokens.weight': expected [200, 64] for embed, got [199, 64]"
    assert refusal(folder) == misfit(
        folder, embed, "tensor 'lm_head.weight': expected [200, 64] for lm_head, got [199, 64]"
    )
    (folder / "config.json").write_text(sound)
    assert len(LLM(folder, skip_tokenizer=True).generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 3


# arguments


@pytest.mark.parametrize(("length", "shown"), [(65, "65"), (1, "1"), (-3, "-3"), ("8", "'8'"), (8.0, "8.0")])
def test_max_model_len_beyond_the_model(length: Any, shown: str, folder: Path) -> None:
    message = f"max_model_len must be an integer from 2 to 64, the positions in {folder / 'config.json'}, got {shown}"
    assert refusal(folder, max_model_len=length) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device": "abacus"}, "device must be cpu, or cuda on a machine with a GPU, got 'abacus'"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"num_kv_blocks": 2.5}, "num_kv_blocks must be an integer of at least 1, got 2.5"),
        (
            {"disable_passes": ["fuse_norms"]},
            f"disable_passes must name passes of {', '.join(PASSES)}, all, got 'fuse_norms'",
        ),
    ],
)
def test_argument_that_cannot_be_used(arguments: dict[str, Any], message: str, folder: Path) -> None:
    kind = CheckpointError if "dtype" in arguments else SageError
    assert refusal(folder, kind, **arguments) == message


# plugins


def test_a_plugin_that_was_not_generated(folder: Path, tmp_path: Path) -> None:
    message = f"plugin {tmp_path} is not a generated folder; run `sagellm generate --specs MY_SPECS --out FOLDER`"
    assert refusal(folder, PluginError, plugins=[tmp_path]) == message


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated folder, to be copied."""
    out = tmp_path_factory.mktemp("generated") / "plugin"
    driver.generate([Path(driver.PACKAGE, "examples", "add_an_op", "specs")], out=out)
    return out


def test_a_plugin_that_redefines_a_name(folder: Path, generated: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(generated, tmp_path / "plugin"))
    again = Path(shutil.copytree(generated, tmp_path / "again"))
    message = f"plugin {again}: OPS already contains mish_mul; rename it in your specs"
    assert refusal(folder, PluginError, plugins=[out, again]) == message


def test_a_plugin_that_was_damaged_and_repaired(folder: Path, generated: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(generated, tmp_path / "plugin"))
    registry = out / "ops" / "__init__.py"
    sound = registry.read_text()
    registry.write_text("OPS = missing\n")
    why = "NameError: name 'missing' is not defined"
    message = f"plugin {out} cannot be imported ({why}); generate it again"
    assert refusal(folder, PluginError, plugins=[out]) == message
    registry.write_text(sound)
    LLM(folder, skip_tokenizer=True, plugins=[out])


# tokenizer


def test_no_tokenizer(folder: Path) -> None:
    message = f"expected tokenizer.json in {folder}; copy it from the model's page, or pass prompts as token ids"
    assert refusal(folder, TokenizerError, skip_tokenizer=False) == message


def test_an_unknown_architecture_comes_before_a_missing_tokenizer(folder: Path) -> None:
    edit_config(folder, architectures=["NobodysModel"])
    assert "got NobodysModel" in refusal(folder, CheckpointError, skip_tokenizer=False)


def test_text_for_a_model_that_was_loaded_without_tokenizer(llm: LLM) -> None:
    with pytest.raises(TokenizerError) as caught:
        llm.generate("hello", GREEDY)
    assert str(caught.value) == (
        "a text prompt requires the tokenizer; load the model without skip_tokenizer, or pass token ids"
    )
    assert not llm.engine.has_work


# requests

BAD_REQUESTS: list[tuple[Any, str]] = [
    ([[]], "the prompt must have at least one token"),
    ([[1, 199]], "prompt token 1 must be from 0 to 198 for this model, got 199"),
    ([-1], "prompt token 0 must be from 0 to 198 for this model, got -1"),
    ([[1, 2.0]], "prompt token 1 must be an integer, got a float"),
    ([1, 2.0], "a prompt must be a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids', got 1"),
    (
        [[3], None],
        "a prompt must be a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids', got null",
    ),
    (
        [[1] * 64],
        "the prompt must have at most 63 tokens for this model, one less than its 64 positions, got 64",
    ),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_bad_prompt_is_refused_and_nothing_is_queued(prompts: Any, message: str, llm: LLM) -> None:
    with pytest.raises(PromptError) as caught:
        llm.generate(prompts, GREEDY)
    assert str(caught.value) == message
    assert not llm.engine.has_work


@pytest.mark.parametrize("mode", ["generate", "stream"])
def test_one_bad_prompt_in_a_list_adds_nothing(mode: str, llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"^prompt token 0 must be from 0 to 198 for this model, got 500$"):
        list(getattr(llm, mode)([[1, 2], [3], [500], [4]], GREEDY))
    assert not llm.engine.has_work
    assert llm.engine.scheduler.get_num_waiting() == 0
    assert [len(output.outputs[0].token_ids) for output in llm.generate([[1, 2], [3]], GREEDY)] == [3, 3]


def test_a_prompt_that_the_kv_cache_cannot_hold(folder: Path) -> None:
    llm = LLM(folder, skip_tokenizer=True, block_size=4, num_kv_blocks=3)
    with pytest.raises(PromptError) as caught:
        llm.generate([[1, 2], [5] * 12], GREEDY)
    assert str(caught.value) == (
        "the prompt must have at most 11 tokens, one less than the KV cache holds, got 12; raise num_kv_blocks"
    )
    assert not llm.engine.has_work
    assert len(llm.generate([5] * 11, SamplingParams(max_tokens=1))[0].outputs[0].token_ids) == 1


def test_another_number_of_params_than_prompts(llm: LLM) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])
    assert str(caught.value) == ("expected one SamplingParams, or one per prompt, got 2 for 3 prompts")
    assert not llm.engine.has_work


def test_params_beyond_the_vocabulary(llm: LLM) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        llm.generate([1], SamplingParams(stop_token_ids=[199]))
    assert str(caught.value) == "stop_token_ids must hold token ids from 0 to 198 for this model, got 199"
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number from 0 to 100, got nan"),
        ({"temperature": -0.5}, "temperature must be a number from 0 to 100, got -0.5"),
        (
            {"n": 2, "temperature": 0.0},
            "n must be 1 when temperature is 0, as all greedy answers are the same, got 2",
        ),
        ({"n": 0}, "n must be an integer from 1 to 128, got 0"),
    ],
)
def test_bad_sampling_params(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**values)
    assert str(caught.value) == message


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    output = llm.generate([[1, 2, 3]], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))[0]
    assert [len(answer.token_ids) for answer in output.outputs] == [4, 4, 4]
    assert not llm.engine.has_work


def test_lint_prints_no_escape_sequences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, rope_parameters={"rope_type": "\x1b[2J"})
    assert lint_checkpoint(LintRequest("model", folder, None, None, [], as_json=False)) == 1
    assert "rope scaling '\\x1b[2J' is not supported" in capsys.readouterr().err
