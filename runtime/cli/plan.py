"""`sagellm plan`: searches the deployment that serves a trace best, and writes its deploy spec."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sageLLM.runtime.cli.hardware_entry import find_hardware
from sageLLM.runtime.cli.plan_request import PlanRequest
from sageLLM.runtime.cli.plan_workers import ModelWorkers
from sageLLM.runtime.cli.simulate_setup import layout_and_config
from sageLLM.runtime.cli.trace_options import requested_trace
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.sim.plan_candidates import Choice, Space
from sageLLM.runtime.sim.planner import FORMS, Capacity, Form, Search
from sageLLM.runtime.sim.trace import TraceRequest

TITLES: dict[Form, str] = {
    "together": "prefill and decode together",
    "disaggregated": "prefill and decode on different workers",
    "attention_ffn": "attention and FFN on different workers",
}
MIN_GAIN = 0.02
"""The relative gain from which a form counts as better than another."""
MAX_REQUESTS = 256
"""Requests per step, the default of `sagellm serve`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The best deployment of each form with its capacity, the best first, and the effort."""

    ranked: list[tuple[Choice, Capacity]]
    num_candidates: int
    num_simulated: int


def run_plan(request: PlanRequest) -> int:
    """Prints the plan, and writes the spec; an error goes to stderr, with exit code 1."""
    try:
        trace = requested_trace(request)
        plan = make_plan(request, trace)
        text = _spec(request, plan.ranked[0][0])
        if request.out is not None:
            request.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_data(plan, text)) if request.as_json else as_text(plan, request, trace))
    if request.out is None and not request.as_json:
        print(f"\n{text.rstrip()}")
    return 0


def make_plan(request: PlanRequest, trace: Sequence[TraceRequest]) -> Plan:
    """Searches the deployments. Raises ValueError if the model fits none, or none can reach the objective."""
    found = search_space(request, trace).candidates()
    search = Search(trace, request.slo, request.attainment)
    candidates = [candidate for candidate, _ in found.values()]
    ranked = (search.exhaustive if request.is_exhaustive else search.run)(candidates)
    return Plan([(found[one.candidate.name][1], one) for one in ranked], len(found), search.num_simulated)


def search_space(request: PlanRequest, trace: Sequence[TraceRequest]) -> Space:
    """The deployments of a model that hold the longest request of a trace."""
    if unknown := [form for form in request.forms if form not in FORMS]:
        raise ValueError(f"--form must be one of {', '.join(FORMS)}, got {unknown[0]}")
    layout, config = layout_and_config(request.model)
    longest = max(one.num_prompt_tokens + one.num_output_tokens for one in trace)
    workers = ModelWorkers(layout, config, find_hardware(request.hardware), longest)
    degrees = workers.degrees(request.num_devices)
    scheduler = PDSchedulerConfig(max_prefill_batch_size=MAX_REQUESTS, max_decode_batch_size=MAX_REQUESTS)
    return Space(request.num_devices, degrees, workers, scheduler, request.forms or FORMS, request.max_pp)


def as_text(plan: Plan, request: PlanRequest, trace: Sequence[TraceRequest]) -> str:
    """The best deployment of each form, and the loss of the others against the best."""
    slo, choice, best = request.slo, *plan.ranked[0]
    rate = len(trace) / (trace[-1].arrival_s or 1.0)
    lines = [
        f"{plan.num_candidates} deployments on {request.num_devices} devices, compared by as many simulated requests "
        f"as in {plan.num_simulated / len(trace):.0f} runs of the trace",
        f"Rate at which {100 * request.attainment:g} % of the requests meet TTFT <= {1e3 * slo.ttft_s:g} ms and "
        f"TPOT <= {1e3 * slo.tpot_s:g} ms:",
    ]
    for form, (one, capacity) in best_of_forms(plan).items():
        lines.append(f"  {capacity.rate:8.2f}/s  {TITLES[form]}: {one.name}")
    lines += [f"Best: {choice.name}; the trace has {rate:.2f}/s.", *verdicts(plan)]
    if best.rate < rate:
        lines.append(f"The trace needs {rate / best.rate:.1f} times as many devices.")
    return "\n".join(lines)


def best_of_forms(plan: Plan) -> dict[Form, tuple[Choice, Capacity]]:
    """The best deployment of each form."""
    found: dict[Form, tuple[Choice, Capacity]] = {}
    for choice, capacity in plan.ranked:
        found.setdefault(capacity.candidate.form, (choice, capacity))
    return found


def verdicts(plan: Plan) -> list[str]:
    """A sentence for each disaggregated form: whether it pays, and by how much."""
    forms = best_of_forms(plan)
    if "together" not in forms:
        return []
    together = forms.pop("together")[1].rate
    found = []
    for form, (_, capacity) in forms.items():
        gain = capacity.rate / together - 1
        pays = "pays" if gain > MIN_GAIN else "does not pay"
        title = TITLES[form][0].upper() + TITLES[form][1:]
        found.append(f"{title}: {pays} here, {gain:+.0%} against {TITLES['together']}.")
    return found


def as_data(plan: Plan, spec: str) -> dict[str, object]:
    """The plan as JSON data."""
    ranked = [
        {"name": choice.name, "form": capacity.candidate.form, "requests_per_s": capacity.rate}
        for choice, capacity in plan.ranked
    ]
    counts = {"num_candidates": plan.num_candidates, "num_simulated_requests": plan.num_simulated}
    return {"ranked": ranked, **counts, "verdicts": verdicts(plan), "spec": spec}


def _spec(request: PlanRequest, choice: Choice) -> str:
    """The deploy spec of a deployment."""
    from sageLLM.codegen.render import Renderer

    hardware = find_hardware(request.hardware)
    model = Path(request.model)
    return Renderer().render(
        "deploy/spec.yaml.jinja",
        name=request.name,
        summary=f"Chosen by `sagellm plan` for {request.num_devices} devices.",
        model=str(model.parent if model.name == "config.json" else model),
        hardware=request.hardware or hardware.name,
        device="cpu" if hardware.name == "cpu" else "cuda",
        choice=choice,
        slo=request.slo,
    )
