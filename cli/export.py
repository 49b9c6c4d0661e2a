"""``co3d export MODEL.onnx --triton REPO/``: a compiled model as other servers want it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from co3d_compile.cli.common import (
    OTHER,
    OUTPUT,
    Command,
    json_option,
    option,
    print_json,
    stdout,
    verbose_option,
)
from co3d_compile.runtime.stored_metadata import read_contract
from co3d_compile.targets.triton_repository import Options, write_repository


@click.command(cls=Command, name="export")
@click.argument("model", type=click.Path(path_type=Path))
@option(
    "--triton",
    "repository",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    group=OUTPUT,
    metavar="REPO",
    help="Write the model and its config.pbtxt into a repository of Triton Inference Server.",
)
@option("--name", group=OUTPUT, metavar="NAME", help="The model's name for clients. [default: the file's]")
@option(
    "--strategy",
    type=click.Choice(["oldest", "direct"]),
    default="oldest",
    show_default=True,
    group=OTHER,
    help="How sequences are batched: the oldest requests of all, or each sequence in a slot of its own.",
)
@option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    group=OTHER,
    metavar="N",
    help="Sequences in one batch.",
)
@option(
    "--max-sequences",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    group=OTHER,
    metavar="N",
    help="With oldest: sequences that one instance holds.",
)
@option(
    "--queue-delay",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    group=OTHER,
    metavar="US",
    help="Microseconds that a request may wait for others.",
)
@option(
    "--idle",
    type=click.IntRange(min=1),
    default=10_000_000,
    show_default=True,
    group=OTHER,
    metavar="US",
    help="Microseconds after which a sequence without requests is dropped.",
)
@option(
    "--instances",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    group=OTHER,
    metavar="N",
    help="Copies of the model, on each device.",
)
@option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    group=OTHER,
    help="Where the instances run.",
)
@json_option
@verbose_option
def command(model: Path, repository: Path, name: str | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Write a compiled model for another server.

    \b
    Example:
      co3d export model.onnx --triton repository/ --max-batch 16
    """
    contract = read_contract(model)
    folder = write_repository(model, contract, repository, name=name, options=Options(**options))
    if as_json:
        print_json({"model": str(model), "folder": str(folder), "states": len(contract.states), **options})
    else:
        click.echo(f"{folder}: {len(contract.states)} states kept by the server", file=stdout())
