"""/tokenize and /detokenize."""

from __future__ import annotations

from sageLLM.runtime.server.bodies import DetokenizeBody, TokenizeBody
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.prompts import check_model, render_chat, tokenize
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.text.tokenizer import Tokenizer


async def tokenize_text(service: Service, exchange: Exchange, body: TokenizeBody) -> None:
    check_model(body.model, service.settings.model_names)
    tokenizer = _required(service)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either prompt or messages", "prompt")
    if body.prompt is not None:
        ids = await tokenize(tokenizer, body.prompt, body.add_special_tokens is not False, None)
    else:
        _, ids = await render_chat(
            service.chat,
            body.messages or [],
            template=service.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=service.template_kwargs | (body.chat_template_kwargs or {}),
        )
    texts = [tokenizer.token_text(one, ids[:i][-3:]) for i, one in enumerate(ids)] if body.return_token_strs else None
    await exchange.respond_json(
        {"count": len(ids), "max_model_len": service.ready.max_model_len, "tokens": ids, "token_strs": texts}
    )


async def detokenize(service: Service, exchange: Exchange, body: DetokenizeBody) -> None:
    check_model(body.model, service.settings.model_names)
    tokenizer = _required(service)
    for token_id in body.tokens:
        if not 0 <= token_id < service.ready.vocab_size:
            raise ApiError(400, f"tokens must be from 0 to {service.ready.vocab_size - 1}, got {token_id}", "tokens")
    await exchange.respond_json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _required(service: Service) -> Tokenizer:
    if service.tokenizer is None:
        raise ApiError(400, "the server runs without a tokenizer")
    return service.tokenizer
