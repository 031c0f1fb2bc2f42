"""The worked examples: an op, a model and a pass that are added by YAML alone, generated, and run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen import driver
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.registry.plugins import load_registry

EXAMPLES = Path(driver.PACKAGE, "examples")
MakeCheckpoint = Callable[..., Path]


def generated(example: str, tmp_path: Path) -> Path:
    """The example's specs, generated out of tree."""
    out = tmp_path / "generated"
    driver.generate([EXAMPLES / example / "specs"], out=out)
    return out


def run_generated_tests(out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "generated/tests"],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_new_op(tmp_path: Path) -> None:
    out = generated("add_an_op", tmp_path)
    registry = load_registry([out])
    kernel = registry.kernels["mish_mul"]
    gu = torch.randn(5, 14, dtype=torch.float64)
    gate, up = gu.chunk(2, dim=-1)
    wanted = torch.nn.functional.mish(gate) * up
    torch.testing.assert_close(kernel(gu), wanted, rtol=1e-12, atol=1e-12)
    assert registry.ops["mish_mul"].op == "mish_mul"
    run_generated_tests(out)


def test_a_new_model(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    out = generated("add_a_model", tmp_path)
    layout = load_registry([out]).models["helium"]
    written = {key: value for key, value in transformers.HeliumConfig().to_dict().items() if value is not None}
    assert layout.read_config(HFConfig({})) == layout.read_config(HFConfig(written))
    folder = make_checkpoint("Helium", head_dim=16, num_key_value_heads=4)
    prompts = [[5, 9, 60, 3], list(range(20, 61))]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for mode in ("time_share", "hybrid", "strict"):
        config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)
        llm = LLM(folder, dtype="float32", skip_tokenizer=True, plugins=[out], scheduler=config)
        params = SamplingParams(max_tokens=10, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                wanted = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[0, len(prompt) :]
                logprobs = model(ids).logits[0].log_softmax(-1)
            assert list(output.outputs[0].token_ids) == wanted.tolist()
            scored = output.prompt_logprobs or ()
            found = [entry[token].logprob for entry, token in zip(scored[1:], prompt[1:], strict=True) if entry]
            assert found == pytest.approx([logprobs[i, t].item() for i, t in enumerate(prompt[1:])], abs=1e-4)


def test_a_new_pass(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    out = generated("add_a_pass", tmp_path)
    folder = make_checkpoint("Llama")
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompts = [[5, 9, 60, 3], list(range(20, 61))]
    plain = LLM(folder, dtype="float32", skip_tokenizer=True)
    fused = LLM(folder, dtype="float32", skip_tokenizer=True, plugins=[out])
    answers = [[o.outputs[0].token_ids for o in llm.generate(prompts, params)] for llm in (plain, fused)]
    assert answers[0] == answers[1]
    ops = [node.op for node in fused.compiler.kernel_graph("decode").nodes.values()]
    assert ops.count("gated_linear") == fused.model.config.L
    assert "silu_mul" not in ops
    run_generated_tests(out)


def test_an_unknown_architecture_says_what_to_do(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("Helium", head_dim=16)
    with pytest.raises(ValueError) as caught:
        LLM(folder, skip_tokenizer=True)
    known = sorted({name for layout in MODELS.values() for name in layout.architectures})
    assert str(caught.value) == (
        f"{folder}/config.json: expected an architecture with a layout, got HeliumForCausalLM; "
        f"known are {', '.join(known)}. "
        "To add one: `sagellm new model NAME`, which prints the next step (docs/add-a-model.md)"
    )
