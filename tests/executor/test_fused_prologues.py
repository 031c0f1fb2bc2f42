"""A pass that fuses norms into projections: an engine with it runs natively, and returns the same tokens."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sageLLM import LLM, SamplingParams
from sageLLM.codegen import driver
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

PROLOGUES = Path(__file__).parents[1] / "kernels/prologues"


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
@pytest.mark.timeout(180)  # compiles the kernels
def test_a_pass_with_prologues_runs_natively(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    tree, folder = tmp_path / "prologues_tree", make_checkpoint("Llama")
    driver.generate_from_scratch([PROLOGUES], tree)
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    prompts = [[5, 9, 60, 3], list(range(20, 61))]
    plain = LLM(folder, dtype="float32", skip_tokenizer=True)
    fused = LLM(folder, dtype="float32", skip_tokenizer=True, plugins=[tree])
    answers = [[one.outputs[0].token_ids for one in llm.generate(prompts, params)] for llm in (plain, fused)]
    assert answers[0] == answers[1]
    ops = Counter(node.op for node in fused.compiler.kernel_graph("decode").nodes.values())
    layers = fused.model.config.L
    assert (ops["norm_linear"], ops["add_norm_linear"]) == (1, layers - 1)
    assert ops["add_norm_linear_silu_mul"] == layers
    assert not {"linear_silu_mul", "fused_add_rms_norm"} & ops.keys()
    ran = fused.kernel_stats()
    assert ran and all(stats.num_native > 0 and not stats.in_python for stats in ran)
