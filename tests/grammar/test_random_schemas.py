"""Random JSON schemas: a text of the grammar validates against its schema, or the refusal names a keyword.

`make fuzz-schemas` plays 10,000.
"""

from collections import Counter

import pytest
from random_schemas import REFUSED, Walker, check

from sageLLM.runtime.errors import SamplingParamsError
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams

NUM_SCHEMAS = 200


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker()


def test_texts_validate_or_the_refusal_names_a_keyword(walker: Walker) -> None:
    counts = Counter(check(walker, seed) for seed in range(NUM_SCHEMAS))
    assert counts["valid"] > NUM_SCHEMAS // 2 and counts["refused"] > 5, counts


@pytest.mark.parametrize("keyword", list(REFUSED))
def test_a_keyword_that_is_not_enforced_is_refused_by_name(walker: Walker, keyword: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {keyword: REFUSED[keyword]}}}}
    with pytest.raises(SamplingParamsError, match=f"keyword '{keyword}' at \\$.properties.a.items is"):
        walker.compiler.check(StructuredOutputsParams(json=schema), walker.eos_ids)


def test_names_of_properties_and_values_are_not_keywords(walker: Walker) -> None:
    schema = {"properties": {"uniqueItems": {"enum": [{"not": 1}], "default": {"if": 2}}}, "x-order": 1, "title": "t"}
    walker.compiler.check(StructuredOutputsParams(json=schema), walker.eos_ids)
