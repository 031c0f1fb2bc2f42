"""Tests of `sagellm lint model` on configs of published checkpoints: their parameter counts follow from the layout."""

import json
from pathlib import Path

import pytest

from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint

FOLDER = Path(__file__).parent / "published"
PARAMETERS = {
    "Apertus-8B-2509": 8_053_338_240,  # with 64 constants of its activations
    "ERNIE-4.5-21B-A3B-PT": 21_825_437_888,
    "GLM-4.5-Air": 106_852_251_264,  # of 110,468,824,832 with the layer of multi-token prediction
    "Hunyuan-A13B-Instruct": 80_393_183_232,
    "Llama-4-Scout-17B-16E": 107_769_861_120,  # of 109 billion with the vision model; without its rotary scaling
    "MiniMax-M2": 228_689_764_864,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "dots.llm1.base": 142_774_381_696,
    "granite-3.0-1b-a400m-base": 1_334_628_352,
    "EXAONE-4.0-32B": 32_003_216_384,
    "Hunyuan-MT-7B": 7_504_932_864,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "mpt-7b": 6_649_286_656,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656 - 676_550_144,
    "Qwen3-VL-8B-Instruct": 8_190_735_360,
    "Phi-3.5-MoE-instruct": 41_873_153_344,  # without its rotary scaling, which has no parameters
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "gemma-3-4b-it": 4_300_079_472 - 416_866_032 - 2_950_272,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "starcoder2-3b": 3_030_371_328,
}
"""By config, the number of parameters that the Hugging Face hub reports, without layers of multi-token prediction;
for models with images, without vision tower and projector."""


def test_every_config_has_its_count() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_published_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_checkpoint(LintRequest("model", FOLDER / f"{name}.json", None, None, (), as_json=True))
    assert (code, json.loads(capsys.readouterr().out)["parameters"]) == (0, PARAMETERS[name])
