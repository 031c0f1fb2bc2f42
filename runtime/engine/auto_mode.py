"""The scheduler's mode `auto` in the engine: it forecasts with the roofline of the device that runs the model."""

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.scheduler.auto import ForecastChooser
from sageLLM.runtime.scheduler.forecast import ServiceObjective


def make_chooser(compiler: ModelCompiler, device: str, objective: ServiceObjective | None) -> ForecastChooser:
    """Chooses the mode of each step by its forecast for `objective`; `device` is "cpu" or "cuda"."""
    hardware = HARDWARE["h100" if device == "cuda" else "cpu"]
    cost = RooflineStepCost(compiler.layout, compiler.config, hardware, dtype=compiler.dtype)
    return ForecastChooser(cost, objective or ServiceObjective())
