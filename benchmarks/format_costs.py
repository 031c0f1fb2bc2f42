"""Measures loading of a quantised checkpoint in the shape of Llama-2-7B, and the rates of `quantize` and `convert`.

    python benchmarks/format_costs.py [--layers 32] [--form int4-g128] [--rate-layers 1] [--cache FOLDER]
        [--weights-tier mapped]

Weights are random, and written one after another. A load is a new process that answers a prompt of 8 tokens, as in
`start_up.py`, with a KV cache of 8 blocks; memory is in MB, above that of Python with torch. Rates are MB of bfloat16
weights per second, of a checkpoint with `--rate-layers` layers and a small vocabulary. 0 layers skip a part.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import start_up
import torch

from sageLLM.runtime.convert.convert import convert
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.loader.safetensors_writer import Entry, SafetensorsWriter
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import load_registry

REGISTRY = load_registry()
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
SCHEMES = ("int8", "int4-g128", "int4-zeros-g128", "fp8", "awq-g128")
FILES = ("bfloat16", "q8_0", "q4_0")
Named = Iterator[tuple[str, Entry]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--form", default="int4-g128")
    parser.add_argument("--rate-layers", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "sagellm-format-costs"))
    parser.add_argument("--weights-tier", default="device")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        placed = {"weights_tier": options.weights_tier}
        print(json.dumps(start_up.start(options.child, max_model_len=64, num_kv_blocks=8, **placed)))
        return
    if options.layers:
        folder = options.cache / f"{options.form}-{options.layers}"
        if not folder.exists():
            write(folder, options.layers, Scheme.parse(options.form, REGISTRY.methods))
        _load(folder, options.weights_tier)  # compiles the kernels
        found = _load(folder, options.weights_tier)
        print(f"{options.form}, {options.layers} layers: ", end="")
        print(", ".join(f"{name} {found[name]:.2f}" for name in start_up.FIGURES[2:]))
    if options.rate_layers:
        rates(options.cache, options.rate_layers)


def _load(folder: Path, tier: str) -> dict[str, float]:
    """The figures of one new process."""
    command = [sys.executable, __file__, "--child", str(folder), "--weights-tier", tier]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(folder: Path, layers: int, scheme: Scheme | None, **sizes: Any) -> None:
    """A checkpoint with random weights, in the scheme if there is one."""
    config: dict[str, Any] = {**LLAMA_2_7B, "num_hidden_layers": layers, **sizes}
    entries = dict(_entries(config, scheme))
    if scheme is not None:
        config["quantization_config"] = scheme.section(["lm_head"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    random = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder / "model.safetensors", entries) as file:
        for name, (dtype, shape) in entries.items():
            file.write(name, _random(name, dtype, shape, random))


def _entries(config: dict[str, Any], scheme: Scheme | None) -> Named:
    """The tensors of the layout, with those of the scheme in place of linear weights."""
    layout = REGISTRY.models["llama"]
    specs = layout.weights(layout.read_config(HFConfig(config)))
    for part in (part for spec in specs if spec.tied_to is None for part in spec.parts):
        if scheme is not None and part.name.endswith("proj.weight"):
            found = scheme.entries(tuple(part.shape), torch.bfloat16)
            yield from ((part.name.removesuffix("weight") + key, one) for key, one in found.items())
        else:
            yield part.name, (torch.bfloat16, tuple(part.shape))


def _random(name: str, dtype: torch.dtype, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Any words, small scales, weights of about 1 / sqrt(inputs), and norms around 1."""
    if name.endswith("weight_shape"):
        return torch.tensor([0, 0])  # not read
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int32)
    if name.endswith("scale"):
        return (torch.rand(shape, generator=random) * 4e-3 + 1e-3).to(dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).to(dtype)


def rates(cache: Path, layers: int) -> None:
    """Prints the rate of each scheme and file format, written from bfloat16."""
    source, out = cache / f"float-{layers}", cache / "out"
    if not source.exists():
        write(source, layers, None, vocab_size=32, tie_word_embeddings=True)
    megabytes = (source / "model.safetensors").stat().st_size / 1e6

    def timed(name: str, run: Callable[[Path], object], target: Path) -> None:
        start = time.perf_counter()
        run(target)
        print(f"{name:<16} {megabytes / (time.perf_counter() - start):7.0f} MB/s")

    def quantized(form: str) -> Callable[[Path], object]:
        return lambda to: quantize_checkpoint(source, to, Scheme.parse(form, REGISTRY.methods), REGISTRY)

    for form in SCHEMES:
        timed(form, quantized(form), out)
        shutil.rmtree(out)
    for form in FILES:
        file = out.with_suffix(".gguf")
        timed(f"gguf {form}", lambda to, form=form: convert(source, to, REGISTRY, form), file)
        timed("  and back", lambda to, file=file: convert(file, to, REGISTRY, "bfloat16"), out)
        shutil.rmtree(out)
        file.unlink()


if __name__ == "__main__":
    sys.exit(main())
