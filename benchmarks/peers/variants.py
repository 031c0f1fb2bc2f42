"""The compared configurations: an engine with its best settings for one kind of weights and of KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"


@dataclass(frozen=True, slots=True)
class Variant:
    """One column of the table.

    `form` is the form of the weights that the engine reads, `kind` the class in which it competes. `skipped` are the
    workloads that it does not run. `activations` is the `activation_dtype` of ours.
    """

    name: str
    engine: str
    form: str
    kv: str
    kind: str = "16-bit"
    settings: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    activations: str = "auto"

    @property
    def tie_limit(self) -> float:
        """The largest gap to the best logit, in standard deviations of the logits, that counts as a near-tie."""
        if self.kind == "16-bit":
            return 0.3 if self.kv == "u8" else 0.15
        return 0.5 if self.kind == "8-bit" else 2.5  # random weights lose more in 4 bits than trained ones


KINDS = ("16-bit", "8-bit", "4-bit")
"""Classes of weights; engines are compared within a class."""
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ours", "ours", "bf16", "bf16"),
        Variant("vllm", "vllm", "bf16", "bf16"),
        Variant("openvino", "openvino", "fp16", "u8"),
        Variant("openvino-kv16", "openvino", "fp16", "bf16"),
        Variant("llama.cpp", "llama", "bf16", "f16"),
        Variant("llama.cpp-f16", "llama", "f16", "f16"),
        Variant("transformers", "transformers", "bf16", "bf16", skipped=("serve_16", "serve_32", "serve_64")),
        Variant("openvino-int8", "openvino", "int8", "u8", kind="8-bit"),
        Variant("llama.cpp-q8_0", "llama", "q8_0", "f16", kind="8-bit"),
        Variant("llama.cpp-q4_0", "llama", "q4_0", "f16", kind="4-bit"),
        # These read the files that the two variants above have prepared.
        Variant("ours-q8_0", "ours", "q8_0", "bf16", kind="8-bit"),
        Variant("ours-q4_0", "ours", "q4_0", "bf16", kind="4-bit"),
        Variant("ours-q8_0-a8", "ours", "q8_0", "bf16", kind="8-bit", activations="int8"),
        Variant("ours-q4_0-a8", "ours", "q4_0", "bf16", kind="4-bit", activations="int8"),
    )
}

ISA_SETTINGS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "native": {},
    "avx512": {  # AVX512_BF16 without AMX: for machines that have AMX
        "ours": {"SAGELLM_CPU_ISA": "avx512_bf16"},
        "vllm": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        "openvino": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        "transformers": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    },
    "avx2": {
        "ours": {"SAGELLM_KERNEL_FLAGS": "-march=haswell"},
        "vllm": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        "openvino": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        "transformers": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    },
}
"""Environment variables that restrict the instructions of an engine; those without an entry lack a switch."""


def has_amx() -> bool:
    """Whether the machine has AMX tiles."""
    path = Path("/proc/cpuinfo")
    return path.exists() and " amx_tile" in path.read_text(encoding="ascii", errors="replace")


def environment(variant: Variant, isa: str, threads: int, envs: Path) -> dict[str, str]:
    """The environment variables of a process of the variant."""
    found = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **variant.settings}
    if variant.engine == "vllm":
        preloaded = [path for path in (TCMALLOC, str(envs / "vllm/lib/libiomp5.so")) if Path(path).exists()]
        found |= {
            "LD_PRELOAD": ":".join(preloaded),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
    return found | dict(ISA_SETTINGS[isa].get(variant.engine, {}))


def is_restricted(variant: Variant, isa: str) -> bool:
    """Whether the engine can be restricted to this instruction set; every engine can run on all of them."""
    return isa == "native" or variant.engine in ISA_SETTINGS[isa]
