"""Perplexity of the bundled model in Q4_0 by the rule of its scales: least squares, and llama.cpp's extreme element.

    least squares   the scale of the least sum of squared errors of a search
    extreme         the element of the largest magnitude is the code -8

One file is one draw of rounding errors: the same model with its channels in another order, so that others share a
scale, has another perplexity. So each rule is measured with several orders, as pairs. The texts are those of
`quantized_accuracy.py`, and the files of Python's standard library that the model has not learned from.
`python benchmarks/scale_rules.py [ORDERS]`; the default is 24, of which the first is that of the model.
"""

import math
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from quantized_accuracy import NUM_TOKENS, ROOT, SCORES, TEXTS
from safetensors.torch import load_file, save_file
from torch import Tensor

from sageLLM import LLM
from sageLLM.runtime.convert.convert import convert
from sageLLM.runtime.quantize import blocks
from sageLLM.runtime.registry.plugins import load_registry

sys.path.insert(0, str(ROOT / "examples"))

from train_tiny_model import is_held_out, source_files

MODEL = ROOT / "examples" / "tiny_python_model"
PIECE_LEN, NUM_PIECES = 4000, 80
Rule = Callable[[Tensor, blocks.BlockRange], Tensor]


def extreme(x: Tensor, codes: blocks.BlockRange) -> Tensor:
    """Scales [..., 1] with which the element of the largest magnitude has the lowest code."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)) / codes.low


RULES: dict[str, Rule] = {"least squares": blocks._symmetric, "extreme": extreme}


def read_texts() -> dict[str, list[str]]:
    """Pieces of each text that are long enough for NUM_TOKENS tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in source_files(library) if is_held_out(path, library)]
    whole = {
        "scored": (TEXTS / "scored.txt").read_text(encoding="utf-8").split("\f"),
        "calibration": [(TEXTS / "calibration.txt").read_text(encoding="utf-8")],
        "held out": [path.read_text(encoding="utf-8", errors="replace") for path in files],
    }
    return {
        name: [text[at : at + PIECE_LEN] for text in texts for at in range(0, len(text), PIECE_LEN)]
        for name, texts in whole.items()
    }


def losses(model: Path, texts: dict[str, list[str]]) -> dict[str, float]:
    """The mean negative logarithm of the probability of a token, by text."""
    llm = LLM(model)
    assert llm.tokenizer is not None
    found = {}
    for name, pieces in texts.items():
        prompts = [llm.tokenizer.encode(piece)[:NUM_TOKENS] for piece in pieces]
        prompts = [prompt for prompt in prompts if len(prompt) == NUM_TOKENS]
        prompts = prompts[:: max(1, len(prompts) // NUM_PIECES)]
        values = []
        for prompt, output in zip(prompts, llm.generate(prompts, SCORES), strict=True):
            for token, step in zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True):
                assert step is not None
                values.append(-step[token].logprob)
        found[name] = statistics.fmean(values)
    return found


def write_reordered(out: Path, seed: int) -> None:
    """A copy with the channels between layers and those inside feed-forwards in random orders; 0 keeps them."""
    random = torch.Generator().manual_seed(seed)
    weights = load_file(MODEL / "model.safetensors")
    width = weights["model.norm.weight"].shape[0]
    order = torch.randperm(width, generator=random) if seed else torch.arange(width)
    for name, weight in weights.items():
        is_written = name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight"))
        weights[name] = weight[order] if is_written else weight[:, order]
    for name in [name for name in weights if name.endswith("down_proj.weight")]:
        inner = weights[name].shape[1]
        order = torch.randperm(inner, generator=random) if seed else torch.arange(inner)
        weights[name] = weights[name][:, order]
        for other in ("gate_proj", "up_proj"):
            weights[name.replace("down_proj", other)] = weights[name.replace("down_proj", other)][order]
    shutil.copytree(MODEL, out)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})


def increases(seed: int, texts: dict[str, list[str]]) -> dict[tuple[str, str], float]:
    """The relative increase of the perplexity by text and rule, in percent, for one order."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_reordered(model, seed)
        stored = losses(model, texts)
        for rule, function in RULES.items():
            blocks._symmetric = function
            convert(model, Path(folder, f"{rule}.gguf"), load_registry(), "q4_0")
            for text, loss in losses(Path(folder, f"{rule}.gguf"), texts).items():
                found[text, rule] = 100 * math.expm1(loss - stored[text])
    return found


def main() -> None:
    num_orders = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    texts = read_texts()
    found = []
    for seed in range(num_orders):
        found.append(increases(seed, texts))
        print(
            seed, ", ".join(f"{text}, {rule} {value:+.2f} %" for (text, rule), value in found[-1].items()), flush=True
        )
    for text in texts:
        for rule in RULES:
            print(f"{text}, {rule}: mean {statistics.fmean(one[text, rule] for one in found):+.2f} %")
        pairs = [one[text, "extreme"] - one[text, "least squares"] for one in found]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        print(f"{text}, extreme minus least squares: {statistics.fmean(pairs):+.2f} +- {error:.2f} points")


if __name__ == "__main__":
    main()
