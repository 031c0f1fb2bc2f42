"""Emits JSON Schemas, with which editors complete and check spec files."""

import json

from sageLLM.codegen.load import SCHEMAS
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output
from sageLLM.codegen.writer import MARK


def emit_schemas(specs: Specs) -> list[Output]:
    """One `schema/KIND.schema.json` for each kind of spec file; an overlay uses the package's own."""
    if specs.is_overlay:
        return []
    return [Output(f"schema/{name.split('/')[0]}.schema.json", _text(name)) for name in SCHEMAS]


def _text(name: str) -> str:
    schema = SCHEMAS[name].load().model_json_schema(by_alias=True)
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": f"Code {MARK}. DO NOT EDIT."}
    return json.dumps(about | schema, indent=1, ensure_ascii=True) + "\n"
