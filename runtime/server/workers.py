"""/v1/workers: the prefill and decode workers, for an operator."""

from __future__ import annotations

import msgspec

from sageLLM.runtime.server.bodies import RoleBody
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.messages import SetRole
from sageLLM.runtime.server.service import Service


async def set_role(service: Service, exchange: Exchange, body: RoleBody) -> None:
    """Lets a worker drain and take another role; answers with its state, before it has drained."""
    service.require_engine()
    number = exchange.scope["path_params"]["number"]
    await service.client.set_role(SetRole(service.client.new_id(), number, body.role))
    workers = service.client.load.workers if service.client.load else []
    await exchange.respond_json(msgspec.structs.asdict(workers[number]))
