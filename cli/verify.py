"""``co3d verify MODEL.onnx --against MODEL``: a compiled file beside the untouched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from co3d_compile.cli.common import (
    MODEL,
    Command,
    json_option,
    load_model,
    model_options,
    option,
    print_json,
    stdout,
    verbose_option,
)
from co3d_compile.cli.inspect import read_contract
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import console_for, facts_table, verification
from co3d_compile.errors import VerificationError


@click.command(cls=Command, name="verify")
@click.argument("compiled", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@option(
    "--against",
    required=True,
    metavar="MODEL",
    group=MODEL,
    help="The model it was compiled from: a file, or package.module:factory.",
)
@model_options
@json_option
@verbose_option
def command(compiled: Path, against: str, as_json: bool, verbose: int, **options: Any) -> None:
    """Compare a compiled model with the original.

    MODEL.onnx runs in ONNX Runtime beside the model it was compiled from, and every result is compared.

    \b
    Example:
      co3d verify model.onnx --against model.pt2
    """
    read_contract(compiled)
    with Progress(verbose) as progress:
        progress("load")
        loaded = load_model(against, options)
        from co3d_compile.verify import verify

        progress("verify")
        result: dict[str, Any] = verify(
            compiled,
            loaded.program,
            loaded.example_inputs,
            progress=lambda _, done, total: progress("verify", done, total),
        ).to_dict()
    if as_json:
        print_json({**result, "model": str(compiled), "against": against})
    else:
        table = facts_table()
        table.add_row("Model", str(compiled))
        table.add_row("Against", f"{against} ({loaded.kind})")
        table.add_row("Verification", verification(result))
        console_for(stdout()).print(table)
    if not result["passed"]:
        raise VerificationError(f"{compiled} differs from {against}: {result['reason']}")
