"""`Engine.submit` of an id that is in use changes nothing."""

from pathlib import Path

import pytest

from sageLLM import LLM, SamplingParams
from sageLLM.codegen.driver import PACKAGE


def test_a_second_request_of_an_id_leaves_the_first_one_alone() -> None:
    llm = LLM(Path(PACKAGE, "examples", "tiny_python_model"), dtype="float32", max_model_len=64)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    [expected] = llm.generate([[5, 6]], params)
    llm.engine.add("twin", None, [5, 6], params)
    llm.engine.step()
    with pytest.raises(ValueError, match="already being served"):
        llm.engine.add("twin", None, [7, 8], params)
    while llm.engine.has_work:
        outputs = llm.engine.step()
    assert outputs[0].outputs[0].token_ids == expected.outputs[0].token_ids
    llm.engine.scheduler.check_integrity()
