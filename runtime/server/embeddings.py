"""/v1/embeddings."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from sageLLM.runtime.engine.embedding_requests import embedding_ids
from sageLLM.runtime.engine.requests import validate_prompt
from sageLLM.runtime.server.admission import CHARS_PER_TOKEN, Ticket
from sageLLM.runtime.server.bodies import EmbeddingBody
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.messages import Embed
from sageLLM.runtime.server.prompts import PromptSource, check_model, completion_prompts, estimated_tokens
from sageLLM.runtime.server.service import Service


async def embed(service: Service, exchange: Exchange, body: EmbeddingBody, ticket: Ticket) -> None:
    check_model(body.model, service.settings.model_names)
    if body.encoding_format not in ("float", "base64"):
        raise ApiError(400, "encoding_format must be 'float' or 'base64'", "encoding_format")
    if not body.input:
        raise ApiError(400, "input must be a text or token ids, or a list of these, and not empty", "input")
    sources = completion_prompts(body.input)
    service.admission.claim(ticket, len(sources), estimated_tokens(sources, CHARS_PER_TOKEN))
    prompts = [_token_ids(service, source, body.truncate_prompt_tokens) for source in sources]
    command = Embed(service.client.new_id(), prompts, normalize=body.normalize)
    vectors = await service.client.embed(command)
    service.admission.start(ticket)
    if body.dimensions is not None:
        vectors = [shortened(vector, body.dimensions) for vector in vectors]
    num_tokens = sum(map(len, prompts))
    await exchange.respond_json(
        {
            "id": f"embd-{exchange.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or service.settings.model_names[0],
            "data": [
                {"index": index, "object": "embedding", "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
        }
    )


def _token_ids(service: Service, source: PromptSource, truncate: int | None) -> list[int]:
    if isinstance(source, list):
        ids = source
    elif service.tokenizer is None:
        raise ApiError(400, "a text requires the tokenizer; the server runs without one, pass token ids", "input")
    else:
        ids = embedding_ids(source, None, service.recipe, service.tokenizer, service.ready.max_model_len)
    if truncate is not None and truncate >= 0:
        ids = ids[:truncate]
    if len(ids) <= service.ready.max_model_len:
        validate_prompt(ids, service.ready.vocab_size, service.ready.max_model_len, generates=False)
    else:
        raise ApiError(
            400,
            f"This model's maximum context length is {service.ready.max_model_len} tokens. However, your request has "
            f"{len(ids)} input tokens. Please reduce the length of the input messages.",
            "input",
        )
    return ids


def shortened(vector: np.ndarray[Any, np.dtype[np.float32]], size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The first `size` components at unit length, as for Matryoshka embeddings. Raises ApiError 400."""
    if not 1 <= size <= len(vector):
        raise ApiError(400, f"dimensions must be from 1 to {len(vector)} for this model, got {size}", "dimensions")
    short = vector[:size]
    return short / max(float(np.linalg.norm(short)), 1e-12)


def _encoded(vector: np.ndarray[Any, np.dtype[np.float32]], form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    floats: list[float] = vector.tolist()
    return floats
