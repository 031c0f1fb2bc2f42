"""Loads a model: its layout, its configuration, and its weights and tables on one device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.checkpoint import MAX_PROBLEMS, check_checkpoint
from sageLLM.runtime.core.model.formats import QuantMethod
from sageLLM.runtime.core.model.hf_config import HFConfig, shown
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.core.model.layout import KvShape, ModelLayout
from sageLLM.runtime.core.model.stored import is_bare, with_stored_names, with_stored_shapes, with_stored_ties
from sageLLM.runtime.core.model.weights import WeightSpec, by_experts
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.attention_ffn import Role, is_ffn_weight
from sageLLM.runtime.execution_graph.stage_sizes import choose_sizes, parse_partition
from sageLLM.runtime.execution_graph.stages import WHOLE, PipelineStage
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES
from sageLLM.runtime.loader.activations import check_used, choose_activations
from sageLLM.runtime.loader.config_file import layout_of, read_config_file, text_section
from sageLLM.runtime.loader.heads import absent_head, without_weights
from sageLLM.runtime.loader.kv_form import choose_kv_form, is_kv_scale
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.quantization import find_in_config, find_in_tensors, refuse_unsupported
from sageLLM.runtime.loader.quantized_checkpoint import QuantizedCheckpoint
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.loader.stage_weights import weights_of_stage
from sageLLM.runtime.loader.tables import PositionTables
from sageLLM.runtime.loader.weights import have_equal_values, load_coded_weights, load_weights
from sageLLM.runtime.registry.plugins import Registry

MAX_POSITIONS = 2**24
"""A bound on the positions in a config.json, which size the rope tables. The longest published is ten million."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
MAX_SHOWN_PROBLEMS = 20


class WeightShare(NamedTuple):
    """The weights of a process, unsharded, and its rank among the `tp` ranks that share each of them."""

    specs: tuple[WeightSpec, ...] = ()
    rank: int = 0
    tp: int = 1


NO_WEIGHTS = WeightShare()


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: weights and tables by their names in graphs, the weights in the form that the kernels read.

    `max_model_len` is the length of the longest sequence, prompt and answer. `weights` are those of the layers of
    `pipeline_stage`, and of what precedes or follows the layers on the first and the last stage. `absent` are the
    weights of a head that the checkpoint lacks; such a model can only compute embeddings. `share` describes the
    weights, also if they are to be read from a file in each step. `dequantized` has the reasons for quantised weights
    that no kernel reads as codes. `kv_form` is the form of KV caches if they consist of codes. `activations`
    is the type that activations of weights of integer codes are rounded to, if they are, and `declared_activations` the
    one in the settings of the weights.
    """

    layout: ModelLayout
    config: Any
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    weights: dict[str, Weight]
    tables: PositionTables
    absent: tuple[str, ...] = ()
    pipeline_stage: PipelineStage = WHOLE
    share: WeightShare = NO_WEIGHTS
    dequantized: dict[str, str] = field(default_factory=dict)
    kv_form: KvForm | None = None
    activations: str | None = None
    declared_activations: str | None = None

    @property
    def generates(self) -> bool:
        """Whether the model computes logits and tokens."""
        return self.layout.generates and not self.absent

    @property
    def layers(self) -> range:
        """The layers with weights here."""
        return self.pipeline_stage.layers(self.config.L)

    @property
    def short_dtype(self) -> str:
        """The element type as graphs spell it: f32, bf16, f16."""
        return SHORT_NAMES[self.dtype]

    @property
    def kv_entry(self) -> KvShape:
        """The entry of a token in a layer's KV cache as stored, in elements of `kv_dtype`."""
        shape = self.layout.cache(self.config)
        return shape if self.kv_form is None else self.kv_form.stored(shape)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The element type of the tensors of KV caches."""
        return self.dtype if self.kv_form is None else TORCH_TYPES[self.kv_form]

    @property
    def num_parameters(self) -> int:
        """The number of parameters; a tied weight counts once."""
        return sum({id(tensor): tensor.numel() for tensor in self.weights.values()}.values())

    @property
    def ties(self) -> dict[str, str]:
        """Maps each tied weight to the name of the weight that it shares, if both are here."""
        ties = {spec.name: spec.tied_to for spec in self.layout.weights(self.config) if spec.tied_to is not None}
        held = {spec.name for spec in self.share.specs}
        return {name: to for name, to in ties.items() if name in held and to in held}

    def bound_tensors(self) -> dict[str, Weight]:
        return {**self.weights, **self.tables.tensors}


def load_model(
    folder: Path,
    registry: Registry,
    *,
    dtype: str,
    device: torch.device,
    max_model_len: int | None,
    rank: int = 0,
    tp: int = 1,
    pp: int = 1,
    pp_layer_partition: str | None = None,
    role: Role | None = None,
    expert_parallel: bool = False,
    has_weights: bool = True,
    is_streamed: bool = False,
    keeps_codes: bool = False,
    kv_cache_dtype: str = "auto",
    activation_dtype: str = "auto",
) -> Model:
    """Loads a Hugging Face checkpoint folder, or the share of one of `tp` tensor-parallel ranks in `pp` stages.

    `rank` numbers the ranks stage by stage, and `pp_layer_partition` sets the layers of each stage, such as "20,10"; by
    default the stages read about as many bytes of weights. With `expert_parallel` each of `tp` ranks has whole experts,
    instead of a part of each. With a `role`, only the weights of attention workers, or those of FFN workers, are read.
    Without `has_weights` the folder is checked, and the model has the config of all ranks and no weights: it is for the
    process that sends steps to workers. With `is_streamed` the weights are left on disk. With `keeps_codes` weights of
    small codes stay so, for a planner with kernels that read them. `kv_cache_dtype` is the form of the KV cache, "auto"
    for the element type, and `activation_dtype` that of activations of weights of integer codes, which then stay codes.

    Raises CheckpointError for an architecture without a layout, a config that the layout rejects, and tensors that are
    missing, unused, or of a different shape, and SageError for a form of the KV cache that the layout does not allow,
    and for a type of activations that no weight is multiplied with.
    """
    path = folder / "config.json"
    data = read_config_file(path)
    layout, config = _read_config(data, path, registry)
    length = _model_len(config.longest, max_model_len, path)
    kv_form = choose_kv_form(kv_cache_dtype, layout, config)
    checkpoint = open_checkpoint(folder, registry)
    kind = _dtype(dtype, (data, text_section(data, layout.root)), path, checkpoint)
    try:
        activations = choose_activations(activation_dtype, checkpoint)
        layout, head = _fit_layout(layout, config, checkpoint, kind, registry.methods)
        stage = _pipeline_stage(folder, layout, config, rank // tp, pp, pp_layer_partition)
        option = f"af='A:Fx{tp}'" if role == "ffn" else f"tensor_parallel_size={tp}"
        own = rank_config(layout, config, rank % tp, tp, option, expert_parallel=expert_parallel)
        held = own if has_weights else config
        # Before the weights, as it can fail and is fast. Without weights only the lengths of the tables are read.
        tables = _tables(held, length, device if has_weights else torch.device("cpu"), path)
        share, weights, dequantized = NO_WEIGHTS, dict[str, Weight](), dict[str, str]()
        if has_weights:
            specs = _weights_of_role(layout, weights_of_stage(layout, config, stage), role)
            share = WeightShare(tuple(map(by_experts, specs) if own.ep > 1 else specs), rank % tp, tp)
        if has_weights and not is_streamed:
            keeps_codes = keeps_codes or activations is not None
            weights, dequantized = read_weights(
                share, checkpoint, kind, device, keeps_codes=keeps_codes, activations=activations
            )
    finally:
        checkpoint.close()
    return Model(
        layout=layout,
        config=held,
        dtype=kind,
        device=device,
        max_model_len=length,
        weights=weights,
        tables=tables,
        absent=head,
        pipeline_stage=stage if has_weights else WHOLE,
        share=share,
        dequantized=dequantized,
        kv_form=kv_form,
        activations=activations,
        declared_activations=checkpoint.declared_activations,
    )


def check_config(folder: Path, registry: Registry) -> None:
    """Raises CheckpointError as `load_model` does for a config.json without a layout, or that the layout rejects."""
    path = folder / "config.json"
    _read_config(read_config_file(path), path, registry)


def _read_config(data: dict[str, Any], path: Path, registry: Registry) -> tuple[ModelLayout, Any]:
    """The layout of a config.json, and what it reads from it. Raises CheckpointError if there is none."""
    layout = layout_of(data, path, registry.models)
    refuse_unsupported(find_in_config(data, path.parent), path.parent, registry.methods)
    try:
        return layout, layout.read_config(HFConfig(data, str(path)))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _pipeline_stage(
    folder: Path, layout: ModelLayout, config: Any, index: int, pp: int, partition: str | None
) -> PipelineStage:
    """The stage of a rank. Raises CheckpointError if the layers cannot be divided so."""
    if pp == 1 and partition is None:
        return WHOLE
    try:
        return PipelineStage(index, choose_sizes(layout, config, pp, parse_partition(partition)))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _fit_layout(
    layout: ModelLayout, config: Any, checkpoint: Checkpoint, kind: torch.dtype, methods: Mapping[str, QuantMethod]
) -> tuple[ModelLayout, tuple[str, ...]]:
    """The layout with the names, shapes and ties of the checkpoint, and the weights of a head that it may lack.

    Raises CheckpointError if the tensors are not those of the layout.
    """
    names = checkpoint.names
    may_lack_head = is_bare(layout, names) or not layout.generates
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored().items()}
    layout = with_stored_shapes(with_stored_names(layout, names), shapes)
    layout = with_stored_ties(layout, config, names, partial(have_equal_values, checkpoint, kind))
    head = absent_head(layout, config, names) if may_lack_head else ()
    layout = without_weights(layout, head) if head else layout
    _check(layout, config, checkpoint, methods)
    return layout, head


def _weights_of_role(layout: ModelLayout, specs: Sequence[WeightSpec], role: Role | None) -> Sequence[WeightSpec]:
    if role is None:
        return specs
    return [spec for spec in specs if is_ffn_weight(layout, spec.name) == (role == "ffn")]


def read_weights(
    share: WeightShare,
    checkpoint: Checkpoint,
    kind: torch.dtype,
    device: torch.device,
    *,
    keeps_codes: bool,
    activations: str | None,
) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights of a process, and the reasons for those of small codes that were dequantised."""
    dequantized: dict[str, str] = {}
    rank = {"rank": share.rank, "tp": share.tp}
    if keeps_codes:
        weights = load_coded_weights(
            share.specs, checkpoint, kind, device, dequantized=dequantized, activations=activations, **rank
        )
        if activations is not None:
            is_used = any(isinstance(one, CodedWeight) and one.activations for one in weights.values())
            check_used(activations, checkpoint.folder, is_used=is_used)
        return dict(weights), dequantized
    return dict(load_weights(share.specs, checkpoint, kind, device, **rank)), dequantized


def rank_config(layout: ModelLayout, config: Any, rank: int, tp: int, option: str, *, expert_parallel: bool) -> Any:
    """The config of one rank. Raises CheckpointError if the degree does not divide the model's sizes.

    `option` is the argument of `LLM` that sets the degree.
    """
    if expert_parallel:
        _check_experts(layout, config, tp, option)
    if tp == 1:
        return config
    try:
        return replace(layout.shard_config(config, tp), rank=rank, ep=tp if expert_parallel else 1)
    except ConfigError as error:
        raise CheckpointError(str(error).replace(f"tensor_parallel_size={tp}", option)) from None


def _check_experts(layout: ModelLayout, config: Any, tp: int, option: str) -> None:
    stacks = {spec.shape[0] for spec in layout.weights(config) if spec.shard is not None and spec.shard.experts}
    if not stacks:
        raise CheckpointError(f"enable_expert_parallel requires a model with experts, got {layout.name}")
    for count in stacks:
        if count % tp:
            raise CheckpointError(f"{option} does not divide the {count} experts; use a divisor of {count}")


def _model_len(longest: int, requested: int | None, path: Path) -> int:
    """The longest sequence: the requested length, or by default all positions of the model, its scaling included."""
    if not 1 < longest <= MAX_POSITIONS:
        raise CheckpointError(f"{path}: the model's positions must be from 2 to {MAX_POSITIONS}, got {longest}")
    if requested is None:
        return longest
    if isinstance(requested, bool) or not isinstance(requested, int) or not 1 < requested <= longest:
        raise CheckpointError(
            f"max_model_len must be an integer from 2 to {longest}, the positions in {path}, got {shown(requested)}"
        )
    return requested


def _dtype(name: str, sections: tuple[Mapping[str, Any], ...], path: Path, checkpoint: Checkpoint) -> torch.dtype:
    """The requested element type, or by default that of the config, or else that of most of the weights.

    `sections` are the config, and the section of the text model in it.
    """
    if name != "auto":
        if name not in DTYPES:
            raise CheckpointError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {shown(name)}")
        return DTYPES[name]
    found = ((key, section.get(key)) for section in sections for key in ("dtype", "torch_dtype"))
    key, named = next((one for one in found if one[1] is not None), ("", None))
    if named is None:
        return _commonest_dtype(checkpoint)
    if not isinstance(named, str) or named not in DTYPES:
        raise CheckpointError(
            f"{path}: '{key}' must be one of {', '.join(DTYPES)}, got {shown(named)}; choose one with dtype="
        )
    return DTYPES[named]


def _commonest_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The element type of most numbers in the checkpoint; float32 if it is none of the types that are computed with."""
    counts: Counter[torch.dtype] = Counter()
    for name in checkpoint:
        info = checkpoint.info(name)
        counts[info.dtype] += prod(info.shape) if info.dtype.is_floating_point else 0
    found = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return found if found in DTYPES.values() else torch.float32


def _tables(config: Any, length: int, device: torch.device, path: Path) -> PositionTables:
    try:
        return PositionTables(config, length, device)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check(layout: ModelLayout, config: Any, checkpoint: Checkpoint, methods: Mapping[str, QuantMethod]) -> None:
    tensors = {name: tensor for name, tensor in checkpoint.stored().items() if not is_kv_scale(name)}
    problems = check_checkpoint(layout, config, {name: tensor.shape for name, tensor in tensors.items()})
    found = find_in_tensors(layout, config, tensors, matches=not problems)
    if not isinstance(checkpoint, QuantizedCheckpoint):
        refuse_unsupported(found, checkpoint.folder, methods)
    if not problems:
        return
    lines = "\n".join(f"  {problem}" for problem in problems[:MAX_SHOWN_PROBLEMS])
    # check_checkpoint stops at MAX_PROBLEMS, so a config with absurdly many layers does not list them all.
    least = "at least " if len(problems) == MAX_PROBLEMS else ""
    more = f"\n  and {least}{len(problems) - MAX_SHOWN_PROBLEMS} more" if len(problems) > MAX_SHOWN_PROBLEMS else ""
    raise CheckpointError(
        f"{checkpoint.folder} does not match the layout '{layout.name}' ({layout.spec}):\n{lines}{more}"
    )
