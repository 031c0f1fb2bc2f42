"""`sagellm dynamo-worker`: an engine as a worker of NVIDIA Dynamo.

Dynamo's frontend renders templates, tokenises, detokenises and finds stop strings; a worker computes token ids. The
engine runs in a process, as that of `sagellm serve`. Written for `dynamo.common.backend` of ai-dynamo 1.6.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from sageLLM.runtime.cli.dynamo_engine import DynamoEngine, WorkerMode
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.serve_engine import EngineSpec
from sageLLM.runtime.engine.kv_events import read_config
from sageLLM.runtime.server.messages import HandoffSpec


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """The arguments of `sagellm dynamo-worker`."""

    model: str
    served_model_name: str | None
    namespace: str
    component: str
    endpoint: str
    discovery_backend: str
    request_plane: str
    event_plane: str | None
    endpoint_types: str
    disaggregation_mode: WorkerMode
    kv_host: str
    engine: EngineOptions

    def handoff(self) -> HandoffSpec | None:
        """How the engine exchanges the KV of prompts."""
        if self.disaggregation_mode == "agg":
            return None
        return HandoffSpec(self.disaggregation_mode, self.kv_host, self.engine.kv_load_failure_policy)


def run_dynamo_worker(request: WorkerRequest) -> int:
    """Serves until a signal; returns the exit code. Errors go to stderr."""
    try:
        from dynamo.common.backend.run import run
        from dynamo.common.backend.worker import WorkerConfig
        from dynamo.common.constants import DisaggregationMode
    except ModuleNotFoundError as error:
        print(f"error: `sagellm dynamo-worker` requires {error.name}; pip install 'sagellm[dynamo]'", file=sys.stderr)
        return 1
    name = request.served_model_name or request.model
    config = WorkerConfig(
        namespace=request.namespace,
        component=request.component,
        endpoint=request.endpoint,
        model_name=request.model,
        served_model_name=name,
        endpoint_types=request.endpoint_types,
        discovery_backend=request.discovery_backend,
        request_plane=request.request_plane,
        event_plane=request.event_plane,
        enable_kv_routing=read_config(request.engine.kv_events_config) is not None,
        disaggregation_mode=DisaggregationMode(request.disaggregation_mode),
    )

    async def make(_: list[str] | None) -> tuple[Any, Any]:
        return make_engine(request, name), config

    run(object, [], make)
    return 0


def make_engine(request: WorkerRequest, name: str) -> Any:
    """The engine with the methods of Dynamo's contract."""
    from dynamo.common.backend.engine import LLMEngine

    class SageEngine(DynamoEngine, LLMEngine):  # type: ignore[misc]
        """An engine that Dynamo accepts."""

    spec = EngineSpec(request.model, request.engine, handoff=request.handoff())
    return SageEngine(spec, name, request.disaggregation_mode)
