"""`sagellm calibrate`: compares a hardware entry with measured kernel times, and fits its efficiencies."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sageLLM.runtime.cli.hardware_entry import find_hardware
from sageLLM.runtime.cli.simulate_setup import layout_and_config
from sageLLM.runtime.sim.calibration.fit import fit
from sageLLM.runtime.sim.calibration.kernel_times import Heads, Measured
from sageLLM.runtime.sim.calibration.read_csv import (
    LayerSizes,
    read_profile_tables,
    read_vidur_all_reduces,
    read_vidur_table,
)
from sageLLM.runtime.sim.calibration.read_parquet import read_parquet_tables
from sageLLM.runtime.sim.calibration.report import as_table, as_yaml, family_errors
from sageLLM.runtime.sim.layer_profile import tables_of


@dataclass(frozen=True, slots=True)
class CalibrateRequest:
    """The arguments of `sagellm calibrate`: tables of one device, and the models of those that do not name sizes."""

    hardware: str
    tables: Sequence[Path]
    models: Sequence[str]
    tensor_parallel_size: int
    fits: bool
    as_json: bool


def run_calibration(request: CalibrateRequest) -> int:
    """Prints the errors by family, or the fitted entry; an error goes to stderr, with exit code 1."""
    try:
        hardware = find_hardware(request.hardware)
        measured = _measured(request)
        if request.fits:
            hardware = fit(measured, hardware)
        errors = family_errors(measured, hardware)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if request.as_json:
        print(json.dumps([one._asdict() for one in errors]))
        return 0
    print(as_table(errors))
    if request.fits:
        print(f"\n{as_yaml(hardware, measured)}")
    return 0


def _measured(request: CalibrateRequest) -> Measured:
    """The kernels of all tables."""
    total = Measured()
    models = list(request.models)
    for path in request.tables:
        found = _read(path, models, request.tensor_parallel_size)
        for family, rows in found.kernels.items():
            total.kernels.setdefault(family, []).extend(rows)
        total.all_reduces += found.all_reduces
    if models:
        raise ValueError(f"expected one --model for each profile folder in --tables, got {len(models)} more")
    if not total.kernels and not total.all_reduces:
        raise ValueError(f"expected measured kernels in {', '.join(map(str, request.tables))}, got none")
    return total


def _read(path: Path, models: list[str], tensor_parallel_size: int) -> Measured:
    """The kernels of one table or folder; takes a model from the list if the tables do not name sizes."""
    if path.name == "mlp.csv":
        return read_vidur_table(path)
    if path.name == "all_reduce.csv":
        return read_vidur_all_reduces(path)
    if path.is_dir() and any(path.glob("*.parquet")):
        return read_parquet_tables(path)
    tables = tables_of(path, tensor_parallel_size)
    if not models:
        raise ValueError(f"{path}: expected --model, the config.json of the profiled model")
    layout, config = layout_and_config(models.pop(0))
    shard = layout.shard_config(config, tensor_parallel_size)
    heads = Heads(shard.Nq, shard.Nkv, shard.D)
    vocab = shard.V // tensor_parallel_size
    experts = getattr(shard, "F", 0), getattr(shard, "A", 0)
    return read_profile_tables(tables, LayerSizes(shard.H, heads, shard.I, vocab, *experts))
