"""Compares the weights of quantised checkpoints with those that transformers makes of them, bit for bit.

Run with compressed-tensors 0.20.1, gguf 0.19.0 and accelerate on the path: `python tests/formats/compare.py`.
"""

import tempfile
from pathlib import Path

import torch
import transformers

from sageLLM.runtime.loader.gguf_architectures import ARCHITECTURES
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import load_registry
from tests.conftest import save_random_model, small_config
from tests.formats import gguf_files

TINY = Path(__file__).parents[2] / "examples" / "tiny_python_model"
TYPES = {
    "v_proj.weight": "q6_k",
    "q_proj.weight": "q4_k",
    "k_proj.weight": "q8_0",
    "down_proj.weight": "q6_k",
    "up_proj.weight": "q4_0",
    "lm_head.weight": "q8_0",
}


def check(name: str, model: torch.nn.Module, own: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    wrong = [key for key, value in own.items() if not torch.equal(found[key].to(value.dtype), value)]
    print(f"{name}: {len(own) - len(wrong)} of {len(own)} tensors are equal", *wrong[:3])


def quantised(folder: Path, form: str) -> None:
    out = folder / form
    registry = load_registry()
    quantize_checkpoint(TINY, out, Scheme.parse(form, registry.methods), registry, include_head=form == "int4")
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, quantization_config=settings)
    checkpoint = open_checkpoint(out, load_registry())
    check(form, model, {key: checkpoint.read(key, dtype=torch.bfloat16) for key in checkpoint})


def gguf(folder: Path) -> None:
    source, out = folder / "source", folder / "gguf"
    source.mkdir(), out.mkdir()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": False}
    save_random_model(source, "Llama", 0, "5GB", small_config(sizes))
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [chr(33 + i % 90) * (1 + i // 90) for i in range(199)],
        "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 0,
        "llama.rope.dimension_count": 64,
        "llama.vocab_size": 199,
    }
    plain = gguf_files.convert(source, out / "m.gguf", "llama", TYPES, **words)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="m.gguf", dtype=torch.float32)
    checkpoint = open_checkpoint(plain, load_registry())
    check("gguf", model, {key: checkpoint.read(key) for key in checkpoint})


def names() -> None:
    """The names of tensors beside those that the gguf package gives for each architecture."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    kinds = {name: MODEL_ARCH(kind) for kind, name in MODEL_ARCH_NAMES.items()}
    for architecture, one in ARCHITECTURES.items():
        known = get_tensor_name_map(kinds[architecture], 1)
        blocks = {stem: name for stem, name in one.names.items() if name and not name.startswith(("model.", "lm_head"))}
        found = {stem: known.get_name(f"model.layers.0.{name}") for stem, name in blocks.items()}
        wrong = [stem for stem, name in found.items() if name not in (None, f"blk.0.{stem}")]
        print(f"{architecture}: {sum(map(bool, found.values()))} names are known, {len(wrong)} differ", *wrong)


def main() -> None:
    names()
    with tempfile.TemporaryDirectory() as folder:
        for form in (
            "int8",
            "int4-g32",
            "int4-g64",
            "int4",
            "int8-g32",
            "int4-zeros-g32",
            "fp8",
            "fp8-tensor",
            "fp8-block",
        ):
            quantised(Path(folder), form)
        gguf(Path(folder))


if __name__ == "__main__":
    main()
