"""Structured output in requests: vLLM's `structured_outputs` and OpenAI's `response_format` and `text.format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.server.errors import ApiError

FORMAT = "response_format"
FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def structured_params(
    structured_outputs: dict[str, Any] | None, response_format: dict[str, Any] | None
) -> StructuredOutputsParams | None:
    """The form of the answer; None for free text. Raises SamplingParamsError, and ApiError for two forms."""
    own = None if structured_outputs is None else StructuredOutputsParams.from_mapping(structured_outputs)
    form = of_format(response_format)
    if own is not None and form is not None:
        raise ApiError(400, "a request must have either structured_outputs or response_format", "structured_outputs")
    return own or form


def of_format(form: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """The parameters of `response_format`."""
    if form is None:
        return None
    kind = form.get("type")
    if kind not in FORMATS:
        raise _error(f"response_format.type must be one of {', '.join(FORMATS)}, got {str(kind)[:60]!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=dict(form))
    inner = form.get("json_schema")
    if not isinstance(inner, Mapping):
        raise _error("response_format of type json_schema must have a json_schema")
    schema = inner.get("schema")
    if not isinstance(schema, Mapping):
        raise _error("response_format.json_schema must have a schema that is an object")
    return StructuredOutputsParams(json=schema)


def _error(message: str) -> ApiError:
    return ApiError(400, message, FORMAT)
