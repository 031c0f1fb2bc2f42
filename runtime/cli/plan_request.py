"""Options of `sagellm plan`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from sageLLM.runtime.cli.options import Option
from sageLLM.runtime.cli.simulate_request import TraceOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest(TraceOptions):
    """The options of `sagellm plan`; empty `forms` means all."""

    model: Annotated[str, Option("A config.json, or the folder that holds it.")]
    num_devices: Annotated[int, Option("Devices of the deployment.", "--devices", min=1, max=256)]
    hardware: Annotated[str | None, Option("A device of specs/hardware, or a .yaml file (default: h100).")] = None
    attainment: Annotated[float, Option("Share of the requests that must meet the objective.", min=0.01, max=1.0)] = 0.9
    forms: Annotated[
        list[str],
        Option("together, disaggregated or attention_ffn; can be repeated (default: all).", "--form"),
    ] = field(default_factory=list)
    max_pp: Annotated[int, Option("The most pipeline stages of a worker.", min=1)] = 1
    name: Annotated[str, Option("Name of the deployment in the spec.")] = "planned"
    out: Annotated[Path | None, Option("File for the deploy spec (default: print it).")] = None
    is_exhaustive: Annotated[bool, Option("Simulate all deployments on all requests.", "--exhaustive")] = False
    as_json: Annotated[bool, Option("Print JSON instead of text.", "--json")] = False
