"""``co3d inspect MODEL.onnx``: what a compiled model takes, gives and remembers. Needs no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Group

from co3d_compile.cli.common import Command, bytes_text, json_option, plural, print_json, stdout, verbose_option
from co3d_compile.cli.summary import console_for, facts_table, rows_table, shape_text
from co3d_compile.contract import METADATA_KEY, Contract, StateSpec, parse, resolve
from co3d_compile.errors import ContractError, LoadError

ITEM_BYTES = {"float16": 2, "float64": 8, "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int64": 8}


@click.command(cls=Command, name="inspect")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
@verbose_option
def command(model: Path, as_json: bool, verbose: int) -> None:
    """Show what a compiled model takes, gives and remembers."""
    contract = read_contract(model)
    if as_json:
        print_json(json.loads(contract.to_json()))
        return
    parts: list[Any] = [_facts(model, contract)]
    if contract.states:
        parts += ["", _states(contract, None if verbose else 20)]
    if contract.recomputed:
        table = rows_table("Recomputed on a window at every step", "operator", "module", "reason")
        for item in contract.recomputed:
            table.add_row(item.operator, item.module_path, item.reason)
        parts += ["", table]
    console_for(stdout()).print(Group(*parts))


def read_contract(model: Path) -> Contract:
    """The metadata of a compiled file.

    Raises:
        LoadError: The file cannot be read or is no ONNX model.
        ContractError: It was not written by the compiler, or its metadata is damaged.
    """
    import onnxruntime as ort

    if not model.is_file():
        raise LoadError(f"There is no file {model}.")
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LoadError(f"{model} is no ONNX model that ONNX Runtime can open: {str(error)[:300]}") from error
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ContractError(f"{model} was not written by co3d-compile.", hint="Compile a PyTorch model first.")
    return parse(text)


def state_bytes(state: StateSpec) -> int:
    """Bytes of one state of one stream."""
    return math.prod(resolve(state.shape, 1)) * ITEM_BYTES.get(state.dtype, 4)


def _facts(model: Path, contract: Contract) -> Any:
    table = facts_table()
    table.add_row("Model", f"{model}, {bytes_text(model.stat().st_size)}, compiled by {contract.compiler_version}")
    for item in contract.inputs:
        rate = f"{plural(item.frames_per_step, 'frame')} per step" if item.frames_per_step else "no time"
        table.add_row("Input", f"{item.name} {shape_text([*item.shape])} {item.dtype}, {rate}")
    for out in contract.outputs:
        time = f"{out.entries_per_step} per step" if out.has_time else "newest window"
        table.add_row("Output", f"{out.name} {shape_text([*out.shape])} {out.dtype}, {time}, delay {out.delay}")
    field = contract.receptive_field
    table.add_row("Receptive field", plural(field, "frame") if field else "unbounded (recurrent)")
    table.add_row("Warm-up", f"{plural(contract.warmup_steps, 'step')} before every output is exact")
    if contract.window:
        table.add_row("Window", plural(contract.window, "frame"))
    table.add_row("Boundary", contract.boundary)
    total = sum(state_bytes(state) for state in contract.states)
    table.add_row("State", f"{plural(len(contract.states), 'tensor')}, {bytes_text(total)} per stream")
    if contract.options:
        table.add_row("Options", ", ".join(f"{key}={value}" for key, value in contract.options.items()))
    return table


def _states(contract: Contract, limit: int | None) -> Any:
    table = rows_table("States", "input", "shape", "dtype", "bytes", "next value from")
    for state in contract.states[:limit]:
        size = bytes_text(state_bytes(state))
        table.add_row(state.input, shape_text([*state.shape]), state.dtype, size, state.output)
    if limit is not None and len(contract.states) > limit:
        table.add_row(f"and {len(contract.states) - limit} more (-v)")
    return table
