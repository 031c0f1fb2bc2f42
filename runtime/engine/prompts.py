"""Forms of prompts: text, token ids in lists, arrays and tensors, and vLLM's dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor"
Prompt: TypeAlias = "str | TokenIds | Mapping[str, Any]"
Prompts: TypeAlias = "Prompt | Sequence[Prompt]"

FORMS = "a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """The text of a prompt, its token ids, or both: then the ids are computed, and the text is only reported."""

    text: str | None
    token_ids: list[int] | None


def parse_prompts(prompts: object) -> list[ParsedPrompt]:
    """The prompts of one call: one prompt, or a list of them; none for an empty list.

    Integers in a list or a one-dimensional array are the token ids of one prompt; each row of a two-dimensional array
    is a prompt. Raises PromptError for any other type: iterators and sets have no length or order to rely on, and the
    elements of bytes and dicts are not token ids.
    """
    if isinstance(prompts, str | Mapping):
        return [_parse(prompts)]
    if isinstance(prompts, np.ndarray | torch.Tensor):
        rows = _as_lists(prompts)
        is_batch = prompts.ndim == 2
        return [ParsedPrompt(None, row) for row in rows] if is_batch or rows[0] else []
    if isinstance(prompts, bytes | bytearray | memoryview) or not isinstance(prompts, Sequence):
        raise _error(prompts, f"{FORMS}, or a list of these")
    if len(prompts) and all(isinstance(item, Integral) for item in prompts):
        return [ParsedPrompt(None, token_ids(prompts))]
    return [_parse(item) for item in prompts]


def token_ids(values: object) -> list[int]:
    """A sequence, array or tensor as a list of Python integers; elements of other types are kept, for validation."""
    if isinstance(values, np.ndarray | torch.Tensor):
        if values.ndim != 1:
            raise PromptError(f"the token ids of a prompt must have one dimension, got {values.ndim}", "prompt")
        return _as_lists(values)[0]
    if isinstance(values, str | bytes | bytearray | memoryview) or not isinstance(values, Sequence):
        raise _error(values, "a list of token ids")
    return [int(v) if isinstance(v, Integral) and not isinstance(v, bool) else v for v in values]


def type_ids_per_prompt(num_prompts: int, type_ids: object) -> Sequence[list[int] | None]:
    """The token type ids of each prompt, None where there are none. Raises PromptError for another type or number."""
    if type_ids is None:
        return [None] * num_prompts
    if isinstance(type_ids, np.ndarray | torch.Tensor):
        type_ids = type_ids.tolist()
    if not isinstance(type_ids, list | tuple):
        raise PromptError(f"type_ids must be a list with one list per prompt, got {_kind(type_ids)}", "type_ids")
    if len(type_ids) != num_prompts:
        raise PromptError(
            f"expected one list of type ids per prompt, got {len(type_ids)} lists for {num_prompts} prompts", "type_ids"
        )
    return [None if ids is None else _type_ids(ids) for ids in type_ids]


def _type_ids(values: object) -> list[int]:
    try:
        return token_ids(values)
    except PromptError:
        kind = _kind(values)
        raise PromptError(f"the type ids of a prompt must be a list of integers, got {kind}", "type_ids") from None


def params_per_prompt(num_prompts: int, params: object, default: SamplingParams | None = None) -> list[SamplingParams]:
    """One SamplingParams per prompt, `default` for None. Raises SamplingParamsError for another type or number."""
    if params is None:
        return [default or SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if isinstance(params, Mapping):
        raise SamplingParamsError("expected SamplingParams, got a dict; use SamplingParams.from_mapping(...)")
    if not isinstance(params, list | tuple):
        raise SamplingParamsError(f"expected SamplingParams, or a list of one per prompt, got {_kind(params)}")
    if len(params) != num_prompts:
        raise SamplingParamsError(
            f"expected one SamplingParams, or one per prompt, got {len(params)} for {num_prompts} prompts"
        )
    for position, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise SamplingParamsError(f"expected SamplingParams for prompt {position}, got {_kind(one)}")
    return list(params)


def _parse(prompt: object) -> ParsedPrompt:
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt)
    is_ids = isinstance(prompt, np.ndarray | torch.Tensor | Sequence)
    if not is_ids or isinstance(prompt, bytes | bytearray | memoryview):
        raise _error(prompt, FORMS)
    return ParsedPrompt(None, token_ids(prompt))


def _parse_dict(prompt: Mapping[object, object]) -> ParsedPrompt:
    given = {key: value for key, value in prompt.items() if value is not None}
    if unknown := [shown(key) for key in given if key not in ("prompt", "prompt_token_ids")]:
        raise PromptError(
            f"a prompt dict must have the keys 'prompt' or 'prompt_token_ids', got {unknown[0]}", "prompt"
        )
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if text is None and ids is None:
        raise PromptError("a prompt dict must have one of the keys 'prompt' and 'prompt_token_ids'", "prompt")
    if text is not None and not isinstance(text, str):
        raise PromptError(f"'prompt' of a prompt dict must be a text, got {_kind(text)}", "prompt")
    return ParsedPrompt(text, None if ids is None else token_ids(ids))


def _as_lists(values: npt.NDArray[Any] | torch.Tensor) -> list[list[int]]:
    """The rows of a one- or two-dimensional array of integers. PromptError for another shape or element type."""
    if isinstance(values, torch.Tensor):
        is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    else:
        is_integer = bool(np.issubdtype(values.dtype, np.integer))
    if not is_integer:
        raise PromptError(f"token ids must be integers, got {_kind(values)} of {values.dtype}", "prompt")
    if values.ndim not in (1, 2):
        raise PromptError(f"token ids must have one or two dimensions, got {values.ndim}", "prompt")
    rows: list[list[int]] = values.tolist() if values.ndim == 2 else [values.tolist()]
    return rows


def _error(value: object, must: str) -> PromptError:
    hint = "; decode it to a text" if isinstance(value, bytes | bytearray) else ""
    return PromptError(f"a prompt must be {must}, got {_kind(value)}{hint}", "prompt")


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool | int | float):
        return shown(value)
    if isinstance(value, bytes):
        return "bytes"
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
