"""Tests of the bundled model and its training script: `transformers` loads both results, and the model knows Python."""

import ast
import importlib.util
import json
import sys
import sysconfig
from collections import Counter
from math import log
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_python_model"
SCRIPT = ROOT / "examples" / "train_tiny_model.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
MAX_FOLDER_BYTES = 4_000_000
TINY = [
    *("--vocab-size=300", "--hidden-size=32", "--intermediate-size=48", "--num-layers=2", "--num-heads=4"),
    *("--context-len=128", "--seq-len=64", "--batch-tokens=512", "--threads=1"),
]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out_ids(script: ModuleType, tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """Eight windows of 512 tokens, [8, 512], from a file that the training never saw."""
    path = STDLIB / "shutil.py"
    assert script.is_held_out(path, STDLIB)
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8")).input_ids[: 8 * 512]).view(8, 512)


def loss_of(model: transformers.LlamaForCausalLM, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= MAX_FOLDER_BYTES
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()


def test_transformers_reads_every_weight_and_invents_none() -> None:
    model, info = transformers.LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_tokenizer_restores_any_text(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n\tif  x:\r\n        return 'naïve', \"模型\", 3.14e-7  # 🐍\n\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer("x = 1<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id


def test_tokens_do_not_depend_on_where_a_prompt_ends(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    text = "import os\n\ndef main(args):\n    return os.path.join(args[0], 'x')\n"
    for head in ("import os\n\n", "import os\n\ndef main(", "import os\n\ndef main(args):\n    return os."):
        assert text.startswith(head)
        assert tokenizer(head).input_ids + tokenizer(text[len(head) :]).input_ids == tokenizer(text).input_ids


def test_chat_template_joins_the_messages(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "import os"}, {"role": "user", "content": "def main("}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "import os\ndef main("


def test_loss_on_unseen_code_is_half_of_the_unigram_entropy(
    model: transformers.LlamaForCausalLM, held_out_ids: torch.Tensor
) -> None:
    counts = Counter(held_out_ids.flatten().tolist())
    entropy = -sum(n * log(n / held_out_ids.numel()) for n in counts.values()) / held_out_ids.numel()
    loss = loss_of(model, held_out_ids)
    assert loss < 2.7  # nats per token; 2.45 over all held-out files
    assert loss < entropy / 2  # the best loss of token frequencies alone, counted on this very text


def test_the_order_of_the_tokens_matters(model: transformers.LlamaForCausalLM, held_out_ids: torch.Tensor) -> None:
    order = torch.randperm(held_out_ids.shape[1], generator=torch.Generator().manual_seed(0))
    assert loss_of(model, held_out_ids[:, order]) > 2 * loss_of(model, held_out_ids)


def test_script_and_transformers_compute_the_same_loss(
    script: ModuleType, model: transformers.LlamaForCausalLM, held_out_ids: torch.Tensor
) -> None:
    ours = script.Llama(script.ModelShape())
    ours.load_state_dict({name: weight.float() for name, weight in load_file(MODEL / "model.safetensors").items()})
    with torch.no_grad():
        loss = ours(held_out_ids[:, :-1], held_out_ids[:, 1:]).item()
    assert loss == pytest.approx(loss_of(model, held_out_ids), abs=1e-4)


def longest_valid_head(code: str) -> ast.Module:
    """The syntax tree of as many leading lines as form valid Python."""
    lines = code.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            return ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
    return ast.Module(body=[], type_ignores=[])


def test_greedy_completion_is_a_whole_function(
    model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer("import os\nimport sys\n\ndef main(", return_tensors="pt")
    completion = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    tree = longest_valid_head(tokenizer.decode(completion[0]))
    main = next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)
    assert main is not None, tokenizer.decode(completion[0])
    assert main.name == "main" and main.body


def test_prompts_fit_the_model(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    prompts = (ROOT / "examples" / "prompts.txt").read_text(encoding="utf-8").split("\n---\n")
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert len(prompts) == 8
    assert min(lengths) < 32 < 64 < max(lengths) <= 512 - 64  # some need several chunks, and all leave room to answer


def test_script_trains_two_steps_and_transformers_loads_the_result(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--out", str(tmp_path), "--source", str(STDLIB / "asyncio"), "--steps=2", *TINY])
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 2
    assert record["parameters"] == model.num_parameters()
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 300


def test_script_refuses_a_folder_without_python_files(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path), *TINY])
    message = "needs at least one .py file to learn from and one to hold out; point --source elsewhere"
    assert stop.value.code == f"{tmp_path}: {message}"
