"""Perplexity and agreement of quantised copies of a model with the model itself, on the texts in `benchmarks/texts`.

The texts are excerpts of Python files of this repository as of 2026-12-01, kept so that figures do not change with it.
`python benchmarks/quantized_accuracy.py [MODEL]`; the default is the bundled model, which was trained on Python files.
Copies of the method gptq are calibrated with another text than that of the perplexity. A second line for each copy
with integer codes is with activations of 8 bits (`activation_dtype="int8"`).
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.convert.convert import convert
from sageLLM.runtime.quantize.calibration import sequences_of
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = Path(__file__).parent / "texts"
COPIES = (
    ("int8", "nearest", False),
    ("fp8", "nearest", False),
    *((f"int4-g{size}", method, False) for size in (16, 32, 64) for method in ("nearest", "gptq")),
    ("int4-g32", "gptq", True),
)
"""Formats with the method, and whether the head is quantised too."""
FILES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Formats of GGUF files, with tables of tokens in q8_0. The bundled model's rows are too short for super-blocks."""
NUM_TOKENS = 256
NUM_SAMPLES = 128
SCORES = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)


def scores(model: Path, **options: Any) -> tuple[float, list[int]]:
    """The perplexity of the texts, and the most probable token at each position."""
    llm = LLM(model, **options)
    assert llm.tokenizer is not None
    texts = (TEXTS / "scored.txt").read_text(encoding="utf-8").split("\f")
    prompts = [llm.tokenizer.encode(text)[:NUM_TOKENS] for text in texts]
    prompts = [prompt for prompt in prompts if len(prompt) == NUM_TOKENS]
    total, count, best = 0.0, 0, []
    for prompt, output in zip(prompts, llm.generate(prompts, SCORES), strict=True):
        for token, step in zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True):
            assert step is not None
            total, count = total - step[token].logprob, count + 1
            best.append(max(step, key=lambda one: step[one].logprob))
    return math.exp(total / count), best


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny_python_model"
    perplexity, best = scores(model)
    print(f"as stored: perplexity {perplexity:.3f} over {len(best)} tokens")
    registry = load_registry()
    text = (TEXTS / "calibration.txt").read_text(encoding="utf-8")
    sequences = sequences_of(text, Tokenizer.from_folder(model).encode, NUM_TOKENS, NUM_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        for form, method, include_head in COPIES:
            out = Path(folder, f"{form}-{method}-{include_head}")
            quantize_checkpoint(
                model,
                out,
                Scheme.parse(form, registry.methods),
                registry,
                sequences=sequences if method == "gptq" else None,
                include_head=include_head,
            )
            compare(f"{form}, {method}{', head too' if include_head else ''}", out, best)
        for form in FILES:
            out = Path(folder, f"{form}.gguf")
            convert(model, out, registry, form)
            compare(f"gguf {form}", out, best)


def compare(name: str, model: Path, best: list[int]) -> None:
    """Prints the perplexity of a copy, and the share of positions with the same most probable token."""
    for activations in ("auto",) if name.startswith("fp8") else ("auto", "int8"):
        found, own = scores(model, activation_dtype=activations)
        equal = sum(a == b for a, b in zip(best, own, strict=True)) / len(best)
        label = name if activations == "auto" else f"{name}, activations in {activations}"
        print(f"{label}: perplexity {found:.3f}, {100 * equal:.1f} % of the most probable tokens are equal", flush=True)


if __name__ == "__main__":
    main()
