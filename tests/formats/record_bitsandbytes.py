"""Records weights that bitsandbytes has quantised, and its values of them, for tests without the library.

Run `python tests/formats/record_bitsandbytes.py` with bitsandbytes 0.50.2. Blocks of 256 scales end within a row.
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

FILE = Path(__file__).parent / "recorded_bitsandbytes.safetensors"
ROWS, COLUMNS = {True: 24, False: 4}, 832


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for kind, is_nested in (("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)):
        weight = torch.randn(ROWS[is_nested], COLUMNS, generator=generator)
        codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=is_nested)
        name = f"{kind}{'_nested' if is_nested else ''}"
        found |= {f"{name}.weight": codes, f"{name}.value": functional.dequantize_4bit(codes, state)}
        found |= {f"{name}.weight.{key}": one for key, one in state.as_dict(packed=True).items()}
    weight = torch.randn(ROWS[False], COLUMNS, generator=generator).half()
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    found |= {"llm_int8.weight": codes, "llm_int8.SCB": scales}
    found["llm_int8.value"] = functional.int8_vectorwise_dequant(codes, scales)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, FILE)


if __name__ == "__main__":
    main()
