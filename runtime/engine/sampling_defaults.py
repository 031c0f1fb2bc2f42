"""Default sampling parameters from a checkpoint's generation_config.json, for calls without `params`, as in vLLM."""

from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError, SamplingParamsError
from sageLLM.runtime.loader.json_files import read_json
from sageLLM.runtime.sampling.sampling_params import SamplingParams

FILE = "generation_config.json"
# Keys of the file and the fields that they set; others, such as `do_sample`, have no effect, as in vLLM.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(folder: Path, source: str | Path) -> SamplingParams:
    """The defaults: "auto" reads the checkpoint's file, "vllm" none, a path the file in another folder.

    Raises CheckpointError for a damaged file, a value that SamplingParams rejects, and a folder without the file.
    """
    if source == "vllm":
        return SamplingParams()
    if not isinstance(source, str | Path):
        raise CheckpointError(f"generation_config must be auto, vllm, or a folder, got {shown(source)}")
    path = (folder if source == "auto" else Path(source)) / FILE
    if not path.exists():
        if source == "auto":
            return SamplingParams()
        raise CheckpointError(f"expected {FILE} in {path.parent}; generation_config must be auto, vllm, or a folder")
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {shown(data)}")
    values: dict[str, Any] = {field: data[key] for key, field in _FIELDS.items() if data.get(key) is not None}
    try:
        return SamplingParams(**values)
    except SamplingParamsError as error:
        raise CheckpointError(f"{path}: {error}; to ignore the file, pass generation_config='vllm'") from None
