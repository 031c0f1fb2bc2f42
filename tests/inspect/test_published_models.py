"""Tests of `sagellm lint model` on configs of published checkpoints: their parameter counts follow from the layout.

The files have the sizes of the published models in the keys of transformers' configs, written from model cards and the
defaults of transformers: what is checked against a publication is the count of parameters.
"""

import json
from pathlib import Path

import pytest

from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint

FOLDER = Path(__file__).parent / "published"
PARAMETERS = {
    "AFM-4.5B": 4_619_184_640,  # published as 4.6 billion; without its rotary scaling
    "Apertus-8B-2509": 8_053_338_240,  # with 64 constants of its activations
    "Devstral-2-123B-Instruct-2512": 125_025_988_608,  # published as 123 and 125 billion
    "Devstral-Small-2-24B-Instruct-2512": 24_011_361_280 - 438_958_080,
    "ERNIE-4.5-21B-A3B-PT": 21_825_437_888,
    "FlexOlmo-7x7B-1T": 33_270_665_216,  # published as 33 billion
    "GLM-4.5-Air": 106_852_251_264,  # of 110,468,824,832 with the layer of multi-token prediction
    "GLM-4.7-Flash": 31_221_488_576 - 1_278_094_656,  # without the layer of multi-token prediction
    "Hy3-preview": 295_033_543_488,  # published as 295 billion; without the layer of multi-token prediction
    "HyperCLOVAX-SEED-Think-14B": 14_748_112_896,  # without its scales of activations
    "Hunyuan-A13B-Instruct": 80_393_183_232,
    "K-EXAONE-236B-A23B": 236_571_156_352,  # published as 236 billion
    "Kimi-K2.5": 1_026_408_232_448,  # of the text model, published as 1 trillion; by shape, as its experts are packed
    "Llama-4-Scout-17B-16E": 107_769_861_120,  # of 109 billion with the vision model; without its rotary scaling
    "MiniMax-M2": 228_689_764_864,
    "Mellum2-12B-A2.5B-Base": 12_149_923_072,  # published as 12 billion
    "Ministral-8B-Instruct-2410": 8_019_808_256,
    "Mistral-Small-3.1-24B-Instruct-2503": 24_011_361_280 - 438_958_080,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "dots.llm1.base": 142_774_381_696,
    "granite-3.0-1b-a400m-base": 1_334_628_352,
    "granite-4.0-1b": 1_631_750_144,  # published as 1.6 billion
    "EXAONE-4.0-32B": 32_003_216_384,
    "Hunyuan-MT-7B": 7_504_932_864,
    "Olmo-3-1025-7B": 7_298_011_136,
    "Olmo-3-1125-32B": 32_233_522_176,
    "mpt-7b": 6_649_286_656,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656 - 676_550_144,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032 - 538_631_408,
    "Qwen3-VL-8B-Instruct": 8_190_735_360,
    "Phi-3.5-MoE-instruct": 41_873_153_344,  # without its rotary scaling, which has no parameters
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "Solar-Open-100B": 102_651_799_552,  # published as 102.6 billion
    "Trinity-Mini": 26_123_974_400,  # published as 26 billion
    "Youtu-LLM-2B": 1_961_560_064,  # published as 1.96 billion
    "cwm": 32_581_097_472,  # published as 32 billion
    "gemma-3-4b-it": 4_300_079_472 - 416_866_032 - 2_950_272,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "starcoder2-3b": 3_030_371_328,
    "vaultgemma-1b": 1_038_741_120,
}
"""By config, the number of parameters that the Hugging Face hub reports, without layers of multi-token prediction;
for models with images, without vision tower and projector. Where only a rounded number is published, it is named, and
the number here is that of the model in `transformers`."""


def test_every_config_has_its_count() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_a_published_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_checkpoint(LintRequest("model", FOLDER / f"{name}.json", None, None, (), as_json=True))
    assert (code, json.loads(capsys.readouterr().out)["parameters"]) == (0, PARAMETERS[name])
