"""``co3d export MODEL.onnx --TARGET PLACE``: a compiled model as servers and phones want it.

What it offers are the rows of ``targets/table.py`` that write.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import click

from co3d_compile.cli.common import OUTPUT, Command, F, json_option, option, print_json, stdout, verbose_option
from co3d_compile.errors import Co3dWarning
from co3d_compile.runtime.stored_metadata import read_contract
from co3d_compile.support.readable_numbers import plural
from co3d_compile.targets.table import TARGETS

WRITTEN = [target for target in TARGETS.values() if target.write]


def target_options(command: F) -> F:
    """Adds an option for each target that is written, and one for each setting of these."""
    for target in reversed(WRITTEN):
        for each in reversed(dataclasses.fields(target.settings_class())):
            known = each.metadata
            kind = click.Choice(known["choices"]) if known["choices"] else click.IntRange(min=known["least"])
            command = option(
                f"--{each.name.replace('_', '-')}",
                type=kind,
                default=each.default,
                show_default=True,
                group=f"With --{target.name}",
                metavar=None if known["choices"] else known["metavar"],
                help=known["text"],
            )(command)
    name = option("--name", group=OUTPUT, metavar="NAME", help="The model's name for clients. [default: the file's]")
    command = name(command)
    for target in reversed(WRITTEN):
        command = option(
            f"--{target.name}",
            type=click.Path(path_type=Path),
            group=OUTPUT,
            metavar=target.metavar,
            help=target.text,
        )(command)
    return command


@click.command(cls=Command, name="export")
@click.argument("model", type=click.Path(path_type=Path))
@target_options
@json_option
@verbose_option
def command(model: Path, name: str | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Write a compiled model for a server or a phone.

    \b
    Examples:
      co3d export model.onnx --triton repository/ --max-batch 16
      co3d export model.onnx --litert model.tflite
    """
    places = {target.name: options.pop(target.name) for target in WRITTEN}
    chosen = [target for target in WRITTEN if places[target.name] is not None]
    if len(chosen) != 1:
        raise click.UsageError(f"Give one of {', '.join(f'--{name}' for name in places)}.")
    target = chosen[0]
    settings = target.settings_class()(
        **{each.name: options[each.name] for each in dataclasses.fields(target.settings_class())}
    )
    contract = read_contract(model)
    with warnings.catch_warnings(record=True, category=Co3dWarning) as caught:
        warnings.simplefilter("always", Co3dWarning)
        written = target.writer()(model, contract, places[target.name], name=name, options=settings)
    states, notes = len(contract.states), [str(warning.message) for warning in caught]
    if as_json:
        facts = {"model": str(model), "folder": str(written), "states": states, "notes": notes}
        print_json({**facts, **dataclasses.asdict(settings)})
        return
    click.echo(f"{written}: {target.done.format(states=plural(states, 'state'))}", file=stdout())
    for note in notes:
        click.echo(f"note: {note}", file=stdout())
