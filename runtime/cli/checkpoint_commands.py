"""Commands `sagellm quantize` and `sagellm convert`, which write checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from sageLLM.runtime.cli.convert import convert as write_converted
from sageLLM.runtime.cli.quantize import Method, QuantizeRequest
from sageLLM.runtime.cli.quantize import quantize as write_quantized


def quantize(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder with float weights.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    format: Annotated[
        str,
        typer.Option(help="int8 (a scale per output), int4-g128 (per 128 inputs), fp8, ...; another lists all."),
    ],
    method: Annotated[
        Method, typer.Option(help="nearest: each weight to the nearest code; gptq: errors compensate each other.")
    ] = "nearest",
    calibration: Annotated[
        Path | None, typer.Option(help="A text file for gptq, like the texts that the model will read.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Sequences of the text that gptq reads.")] = 128,
    sample_len: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 512,
    include_head: Annotated[
        bool, typer.Option("--include-head", help="Quantise the output head too, as a separate weight if it is tied.")
    ] = False,
) -> None:
    """Write a copy of a checkpoint with linear weights in 8 or 4 bits, which transformers and vLLM load too."""
    request = QuantizeRequest(model, out, format, method, calibration, num_samples, sample_len, include_head)
    raise typer.Exit(write_quantized(request))


def convert(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The new folder, or the new file if it ends with .gguf.")],
    format: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16; also q8_0, q4_k_m, ... in a GGUF file; another lists all."),
    ] = None,
) -> None:
    """Write a checkpoint folder as a GGUF file, or a GGUF file or quantised folder as a folder with float weights."""
    raise typer.Exit(write_converted(model, out, format))
