"""One adapter per engine: loads a form of the weights, and answers requests of token ids greedily, without stop tokens.

An adapter imports its engine when it is called, so that a process holds one engine alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from shapes import MAX_LEN
from variants import Variant
from workloads import Ask, Complete


def load_ours(folder: Path, variant: Variant, threads: int) -> Complete:
    """sageLLM with its kernels, as `LLM(...)` loads a folder or a GGUF file, without a prefix cache as the others."""
    from sageLLM import LLM, SamplingParams

    model = folder if variant.form == "bf16" else folder / f"{variant.form}.gguf"
    llm = LLM(model, skip_tokenizer=True, enable_prefix_caching=False, activation_dtype=variant.activations)

    def complete(asks: Sequence[Ask]) -> list[list[int]]:
        params = [SamplingParams(max_tokens=ask.num_new, temperature=0.0, ignore_eos=True) for ask in asks]
        outputs = llm.generate([ask.prompt for ask in asks], params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return complete


def load_vllm(folder: Path, variant: Variant, threads: int) -> Complete:
    """vLLM's CPU backend. `variants.environment` preloads its allocator and OpenMP, and binds its threads."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=MAX_LEN,
        max_num_batched_tokens=4096,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )

    def complete(asks: Sequence[Ask]) -> list[list[int]]:
        params = [
            SamplingParams(max_tokens=ask.num_new, temperature=0.0, ignore_eos=True, detokenize=False) for ask in asks
        ]
        prompts = [{"prompt_token_ids": ask.prompt} for ask in asks]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return complete


def load_transformers(folder: Path, variant: Variant, threads: int) -> Complete:
    """transformers, eager; several requests are one padded batch, which runs as long as its longest answer."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def complete(asks: Sequence[Ask]) -> list[list[int]]:
        width = max(len(ask.prompt) for ask in asks)
        num_new = max(ask.num_new for ask in asks)
        padding = [width - len(ask.prompt) for ask in asks]
        ids = torch.tensor([[0] * pad + ask.prompt for ask, pad in zip(asks, padding, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=0
        )
        return [row[width : width + ask.num_new] for row, ask in zip(out.tolist(), asks, strict=True)]

    return complete


def load_llama_cpp(folder: Path, variant: Variant, threads: int) -> Complete:
    """llama.cpp, through the C interface of llama-cpp-python."""
    from llama_cpp_engine import LlamaCpp

    return LlamaCpp(folder / f"{variant.form}.gguf", threads).complete


def load_openvino(folder: Path, variant: Variant, threads: int) -> Complete:
    """OpenVINO GenAI's continuous batching."""
    from openvino_engine import load

    return load(folder / f"openvino-{variant.form}", variant.kv, threads)


def _prepare_nothing(folder: Path, form: str) -> None:
    """The engine reads the checkpoint as it is, or files that another one has prepared."""


def _prepare_gguf(folder: Path, form: str) -> None:
    from gguf_file import write_form

    write_form(folder, form)


def _prepare_openvino(folder: Path, form: str) -> None:
    from openvino_engine import export

    export(folder, form)


LOADERS: dict[str, Callable[[Path, Variant, int], Complete]] = {
    "ours": load_ours,
    "vllm": load_vllm,
    "transformers": load_transformers,
    "llama": load_llama_cpp,
    "openvino": load_openvino,
}
PREPARATIONS: dict[str, Callable[[Path, str], None]] = {
    "ours": _prepare_nothing,
    "vllm": _prepare_nothing,
    "transformers": _prepare_nothing,
    "llama": _prepare_gguf,
    "openvino": _prepare_openvino,
}
