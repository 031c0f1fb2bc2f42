"""Options of the server, apart from those of the engine: names, defaults and help, which `sagellm serve` shows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

POSITIVE = (
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_body_size",
    "max_json_depth",
    "max_header_size",
    "max_header_count",
    "header_timeout",
    "body_timeout",
    "keep_alive_timeout",
)
NOT_NEGATIVE = ("shutdown_timeout", "max_logprobs", "sse_keep_alive_interval")


class Flag(NamedTuple):
    """Help of an option, and its flag if the name of the field is not it."""

    help: str
    flag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Names are those of vLLM's flags where it has them. A request is queued from its admission to its first token."""

    model: str
    served_model_name: Annotated[
        list[str], Flag("A name of the model in the API (default: the argument MODEL); can be repeated.")
    ] = field(default_factory=list)
    host: Annotated[str, Flag("Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1"
    port: Annotated[int, Flag("Port to listen on; 0 chooses a free one.")] = 8000
    uds: Annotated[str | None, Flag("A Unix socket to listen on instead of host and port.")] = None
    api_key: Annotated[
        list[str], Flag("A key that requests under /v1 must have (Authorization: Bearer KEY); can be repeated.")
    ] = field(default_factory=list)
    admin_api_key: Annotated[
        list[str],
        Flag("A key that changes of roles must have instead; without one, they are refused if --api-key is set."),
    ] = field(default_factory=list)
    allowed_origins: Annotated[
        list[str], Flag("An origin of web pages that may call the server (CORS, default: none); can be repeated.")
    ] = field(default_factory=list)
    max_num_queued_reqs: Annotated[int, Flag("Requests that may be queued; more are refused with 429.")] = 1024
    max_num_queued_tokens: Annotated[int | None, Flag("Their prompt tokens (default: four times the KV cache).")] = None
    max_body_size: Annotated[int, Flag("Bytes of a request's body.")] = 16 * 2**20
    max_json_depth: Annotated[int, Flag("Levels of nesting in a body.")] = 64
    max_header_size: Annotated[int, Flag("Bytes of a request's headers.")] = 64 * 2**10
    max_header_count: Annotated[int, Flag("Headers of a request.")] = 256
    header_timeout: Annotated[float, Flag("Seconds in which the headers must arrive.")] = 20.0
    body_timeout: Annotated[float, Flag("Seconds in which the body must arrive.")] = 120.0
    keep_alive_timeout: Annotated[float, Flag("Seconds after which an idle connection is closed.")] = 30.0
    shutdown_timeout: Annotated[
        float | None, Flag("Seconds for admitted requests to finish after SIGTERM (default: no limit).")
    ] = None
    max_logprobs: Annotated[int, Flag("The most log-probabilities per token that a request may ask for.")] = 20
    lenient: Annotated[bool, Flag("Ignore unknown fields of requests instead of refusing them.")] = False
    chat_template: Annotated[Path | None, Flag("A file with the chat template to use instead of the checkpoint's.")] = (
        None
    )
    default_chat_template_kwargs: Annotated[str, Flag("Variables of the chat template, as a JSON object.")] = "{}"
    tool_call_parser: Annotated[
        str | None, Flag("The dialect of tool calls (default: that of the chat template); 'none' for no tool calls.")
    ] = None
    reasoning_parser: Annotated[
        str | None, Flag("The dialect of reasoning (default: that of the chat template); 'none' for no reasoning.")
    ] = None
    enable_auto_tool_choice: Annotated[bool, Flag("Accepted for vLLM's sake: tools are always enabled.")] = True
    enable_force_include_usage: Annotated[bool, Flag("Report usage at the end of every stream.")] = False
    enable_request_id_headers: Annotated[bool, Flag("Return the id of a request in X-Request-Id.")] = True
    sse_keep_alive_interval: Annotated[float, Flag("Seconds between comments in a quiet stream; 0 for none.")] = 0.0
    metrics_namespace: Annotated[str, Flag("Prefix of the metrics; 'vllm' for vLLM's dashboards.")] = "sagellm"
    otlp_traces_endpoint: Annotated[
        str | None, Flag("URL of an OpenTelemetry collector that receives the spans of requests (OTLP over HTTP).")
    ] = None
    log_format: Annotated[Literal["text", "json"], Flag("Form of the log lines.")] = "text"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Flag("The least level that is logged.")] = "info"
    access_log: Annotated[bool, Flag("Log every request.")] = True
    in_process: Annotated[bool, Flag("Run the engine in a thread of the server, for debugging.")] = False

    @property
    def model_names(self) -> list[str]:
        return self.served_model_name or [self.model]

    def why_invalid(self) -> str | None:
        """The reason why the values cannot be used, or None."""
        for name in (*POSITIVE, *NOT_NEGATIVE):
            value, least = getattr(self, name), "above 0" if name in POSITIVE else "at least 0"
            if value is not None and not (value > 0 or (value == 0 and name in NOT_NEGATIVE)):
                return f"{name} must be {least}, got {value:g}"
        if not 0 <= self.port < 2**16:
            return f"port must be from 0 to 65535, got {self.port}"
        for name, keys in (("api_key", self.api_key), ("admin_api_key", self.admin_api_key)):
            if not all(keys):
                return f"{name} must not be empty, as every request would have it"
        if not all(self.model_names):
            return "served_model_name must not be empty"
        if not re.fullmatch(r"[a-zA-Z_]\w*", self.metrics_namespace, re.ASCII):
            return f"metrics_namespace must have letters, digits and _ only, got {self.metrics_namespace!r}"
        return None
