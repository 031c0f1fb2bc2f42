"""Grammars of llguidance from the parameters of structured output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sageLLM.runtime.errors import SamplingParamsError
from sageLLM.runtime.grammar.json_schema import close_objects, why_not_enforced
from sageLLM.runtime.sampling.structured_outputs import FIELD, StructuredOutputsParams, parse

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""The default whitespace between JSON tokens. Without a limit some models produce it up to the end of their context."""
JSON_OBJECT = '{"type": "object"}'


def grammar_text(params: StructuredOutputsParams) -> str:
    """The grammar in llguidance's form. Raises SamplingParamsError for what llguidance could not enforce."""
    text = _form_text(params)
    return text if params.before is None else _joined(params.before, text)


def _joined(before: str, form: str) -> str:
    """A list of grammars, in which the first one calls the form by its name."""
    grammars = json.loads(form)["grammars"] if form.lstrip().startswith("{") else [{"lark_grammar": form}]
    return json.dumps({"grammars": [{"lark_grammar": before}, grammars[0] | {"name": "form"}, *grammars[1:]]})


def _form_text(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in params.choice))
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark(params.grammar))
    if params.structural_tag is not None:
        return LLMatcher.grammar_from_lark(_tag_grammar(parse("structural_tag", str(params.structural_tag))))
    schema = parse("json", JSON_OBJECT if params.json is None else str(params.json))
    return LLMatcher.grammar_from_json_schema(checked_schema("json", schema, params), None, _json_options(params))


def checked_schema(name: str, schema: Any, params: StructuredOutputsParams) -> str:
    """The schema as text. Raises SamplingParamsError for a keyword that is not enforced."""
    if reason := why_not_enforced(schema):
        raise SamplingParamsError(f"{FIELD}.{name}: {reason}", FIELD)
    if params.disable_additional_properties:
        close_objects(schema)
    return json.dumps(schema)


def _json_options(params: StructuredOutputsParams) -> Any:
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}


def _lark(text: str) -> str:
    """The grammar in the Lark dialect; rules of GBNF have `::=`."""
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:
        raise SamplingParamsError(f"{FIELD}.grammar must be Lark or GBNF: {error}", FIELD) from None


def _tag_grammar(tag: object) -> str:
    """Free text with tagged parts: after a trigger the text continues one of the structures."""
    from llguidance import StructTag

    if not isinstance(tag, Mapping) or not {"structures", "triggers"} <= tag.keys():
        raise _tag_error("must be an object with structures and triggers")
    structures, triggers = tag["structures"], tag["triggers"]
    if not isinstance(structures, list) or not structures or not _are_texts(triggers) or not triggers:
        raise _tag_error("must have structures, a list of objects, and triggers, a list of texts")
    tags = []
    for number, one in enumerate(structures):
        place = f"structures[{number}]"
        if not isinstance(one, Mapping) or not _are_texts([one.get("begin"), one.get("end", "")]):
            raise _tag_error(f"{place} must be an object with begin, schema and end")
        trigger = next((text for text in triggers if one["begin"].startswith(text)), None)
        if trigger is None:
            raise _tag_error(f"{place}.begin must begin with one of the triggers")
        if reason := why_not_enforced(one.get("schema", {})):
            raise _tag_error(f"{place}.schema: {reason}")
        schema = json.dumps(one.get("schema", {}))
        tags.append(StructTag(trigger=trigger, begin=one["begin"], grammar=schema, end=one.get("end", "")))
    return StructTag.to_grammar(tags, assume_special=False)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(one, str) for one in values)


def _tag_error(rule: str) -> SamplingParamsError:
    return SamplingParamsError(f"{FIELD}.structural_tag: {rule}", FIELD)
