"""Predicts step durations from op latencies measured on a device, layer by layer.

The tables are those of LLMServingSim's profiler (casys-kaist/LLMServingSim, MIT): dense ops by the tokens of the step,
ops per sequence, experts by tokens and activated experts, and attention by the tokens of a prompt chunk, its context,
the number of decodes and the context of each. Times are linearly interpolated between the points of a table and
extrapolated beyond them. The tables are those of one device without communication.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork
from sageLLM.runtime.sim.profile_tables import Rows, grid, read_lines, read_numbers, read_rows, table_path
from sageLLM.runtime.sim.trace import TraceError

PER_STEP = ("embedding", "final_layernorm")
TWICE_PER_LAYER = "layernorm"
ATTENTION_LAYERS = ("qkv_proj", "o_proj")
MLP_LAYERS = ("gate_up_proj", "act_fn", "down_proj")
PER_SEQUENCE = "lm_head"


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """Facts of a model that select the tables: layers, those with experts, experts in all and per token."""

    num_layers: int
    num_moe_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    has_rope: bool = True
    has_qk_norm: bool = False

    @property
    def num_mlp_layers(self) -> int:
        return self.num_layers - self.num_moe_layers


def tables_of(folder: Path, tensor_parallel_size: int) -> Path:
    """The folder of the tables for a tensor-parallel degree: `folder/tpN`, or `folder` if it contains the tables.

    Tables outside a folder tpN are those of one device. Raises TraceError if the profile lacks the degree.
    """
    wanted = f"tp{tensor_parallel_size}"
    if (folder / wanted).is_dir():
        return folder / wanted
    if table_path(folder, "dense").exists():
        degree = folder.name if folder.name.startswith("tp") and folder.name[2:].isdigit() else "tp1"
        if degree == wanted:
            return folder
        raise TraceError(f"{folder}: expected tables of --tp {tensor_parallel_size}, got those of {degree}")
    found = ", ".join(sorted(path.name for path in folder.glob("tp*"))) or "none"
    raise TraceError(f"{folder}: expected tables in a folder {wanted}, got {found}")


class LayerProfileCost:
    """The duration of a step of a model on each of the devices that its tables are for.

    `link_s` returns the time of the collectives of a step, which the tables do not contain. The tables have at most one
    prompt chunk per step, so of several chunks the largest is looked up together with the decodes, and the others
    alone. The tokens of a step are assumed to select experts uniformly. With `expert_parallel_size` workers over which
    the experts are distributed, all of them are assumed to have as many tokens.

    Raises TraceError naming the tables and rows that the model requires and the profile lacks.
    """

    def __init__(
        self,
        folder: Path,
        model: ProfiledModel,
        link_s: Callable[[StepWork], float] | None = None,
        expert_parallel_size: int = 1,
    ) -> None:
        dense = read_lines(table_path(folder, "dense"), "tokens")
        per_sequence = read_lines(table_path(folder, "per_sequence"), "sequences")
        _check_rows(table_path(folder, "dense"), dense, _required_rows(model))
        _check_rows(table_path(folder, "per_sequence"), per_sequence, (PER_SEQUENCE,))
        self._model = model
        self._link_s = link_s
        self._expert_parallel_size = expert_parallel_size
        self._step = [dense[layer] for layer in PER_STEP]
        self._layer = [line for layer, line in dense.items() if layer not in (*PER_STEP, *MLP_LAYERS)]
        self._layer.append(dense[TWICE_PER_LAYER])
        self._mlp = [dense[layer] for layer in MLP_LAYERS] if model.num_mlp_layers else []
        self._experts = _expert_table(folder, model) if model.num_moe_layers else None
        self._sequence = list(per_sequence.values())
        self._attention = _Attention(table_path(folder, "attention"))

    def step_s(self, work: StepWork) -> float:
        """The seconds of a step with this work; 0 for no work."""
        num_tokens = work.num_tokens
        if not num_tokens:
            return 0.0
        model = self._model
        num_sequences = work.num_decodes + len(work.prefill)
        layer_us = sum(line.at(num_tokens) for line in self._layer) + self._attention.layer_us(work)
        mlp_us = sum(line.at(num_tokens) for line in self._mlp)
        once_us = sum(line.at(num_tokens) for line in self._step) + sum(g.at(num_sequences) for g in self._sequence)
        total_us = layer_us * model.num_layers + mlp_us * model.num_mlp_layers + once_us
        if self._experts is not None:
            total_us += self._experts_us(self._experts, num_tokens) * model.num_moe_layers
        return total_us / 1e6 + (self._link_s(work) if self._link_s else 0.0)

    def _experts_us(self, table: Rows, num_tokens: int) -> float:
        """One layer's experts on one worker: its share of the experts, for the tokens of all workers."""
        model, num_workers = self._model, self._expert_parallel_size
        is_unselected = (1 - model.experts_per_token / model.num_experts) ** (num_tokens * num_workers)
        # Its share of the pairs of a token and an expert is as large as that of its own tokens.
        return table.at(num_tokens, model.num_experts / num_workers * (1 - is_unselected))


def _required_rows(model: ProfiledModel) -> list[str]:
    names = [*PER_STEP, TWICE_PER_LAYER, *ATTENTION_LAYERS]
    names += ["rotary_emb"] * model.has_rope + ["qk_norm"] * model.has_qk_norm
    return [*names, *MLP_LAYERS] if model.num_mlp_layers else names


def _check_rows(path: Path, found: Collection[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        raise TraceError(f"{path}: expected rows for {', '.join(missing)}, got none")


def _expert_table(folder: Path, model: ProfiledModel) -> Rows:
    path = table_path(folder, "moe")
    if not path.exists():
        raise TraceError(f"{path}: expected the times of {model.num_experts} experts, got no such file")
    return read_rows(path)


class _Attention:
    """Attention latencies of one layer: decodes alone, a chunk alone, and a chunk together with decodes."""

    def __init__(self, path: Path) -> None:
        numbers = ((tuple(point), time) for *point, time in read_numbers(path))
        rows = {point: time for point, time in numbers if all(map(_is_zero_or_power_of_2, point))}
        self._decodes = grid({(n, d): t for (c, k, n, d), t in rows.items() if not c}, path)
        self._chunk = grid({(c, k): t for (c, k, n, d), t in rows.items() if not n}, path)
        self._both = grid({point: t for point, t in rows.items() if point[0] and point[2]}, path)

    def layer_us(self, work: StepWork) -> float:
        """The microseconds of attention in one layer of the step."""
        chunks = sorted(work.prefill, key=lambda chunk: chunk.num_tokens)
        largest = chunks.pop() if chunks else None
        return self._largest_us(largest, work) + sum(self._chunk.at(n, start) for start, n in chunks)

    def _largest_us(self, chunk: PromptChunk | None, work: StepWork) -> float:
        if not work.num_decodes:
            return self._chunk.at(chunk.num_tokens, chunk.start) if chunk else 0.0
        mean_context = work.num_context_tokens / work.num_decodes
        if chunk is None:
            return self._decodes.at(work.num_decodes, mean_context)
        return self._both.at(chunk.num_tokens, chunk.start, work.num_decodes, mean_context)


def _is_zero_or_power_of_2(value: float) -> bool:
    """Whether a value is 0 or a power of two: at these values the profiler's grid is complete."""
    return int(value) & (int(value) - 1) == 0
