"""The model and the lengths of requests that several simulations share."""

from dataclasses import replace
from functools import cache

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import Link
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.sim.trace import Lengths

YI_34B = {
    "hidden_size": 7168,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "intermediate_size": 20480,
    "vocab_size": 64000,
    "max_position_embeddings": 32768,
}
# Prompts and answers by the medians and 90th percentiles of Sarathi-Serve's datasets (arXiv 2403.02310).
SHAREGPT = Lengths(1730, 5696, 8192), Lengths(415, 834, 8192)
ARXIV = Lengths(7059, 12985, 16384), Lengths(208, 371, 16384)


@cache
def yi_34b() -> RooflineStepCost:
    """Yi-34B on two A100s, once per process: building its graph takes longer than many a simulation.

    At the rates of the data sheet: the steps of Sarathi-Serve's paper are as short, and those of the entry's fitted
    efficiencies 40 % longer (docs/simulate.md).
    """
    layout = MODELS["llama"]
    device = replace(HARDWARE["a100"], efficiency={}, link=Link(3.0e11, 3.0))
    return RooflineStepCost(layout, layout.read_config(HFConfig(YI_34B)), device, tensor_parallel_size=2)
