"""The scheduler's mode `auto` in the engine: it forecasts with the roofline of the device that runs the model."""

import torch

from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.executor.device_hardware import hardware_of
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.scheduler.auto import ForecastChooser
from sageLLM.runtime.scheduler.forecast import ServiceObjective


def make_chooser(compiler: ModelCompiler, device: torch.device, objective: ServiceObjective | None) -> ForecastChooser:
    """Chooses the mode of each step by its forecast for `objective` on `device`."""
    form = compiler.kv_form
    cost = RooflineStepCost(compiler.layout, compiler.config, hardware_of(device), dtype=compiler.dtype, kv_form=form)
    return ForecastChooser(cost, objective or ServiceObjective())
