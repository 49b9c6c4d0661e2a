"""``co3d``: the commands around a compiled model."""

from __future__ import annotations

import importlib

import click

from co3d_compile.cli.common import EXIT_CODES, OneLineMain, join, version_option
from co3d_compile.support.readable_numbers import did_you_mean

EPILOG = f"""\b
Examples:
    co3d-compile model.pt2 -o model.onnx --labels names.txt
    co3d run model.onnx --source video.mp4
    co3d inspect model.onnx --html report.html
    co3d verify model.onnx --against model.pt2

{EXIT_CODES}"""

NAMES = ("run", "inspect", "verify", "compare", "bench", "export", "serve", "doctor")
# What people type that is a command of another name.
OTHERS = {"compile": "Did you mean co3d-compile?", "help": "Did you mean co3d --help?"}


class LazyGroup(OneLineMain, click.Group):
    """A group that imports a command's module when the command is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NAMES:
            return None
        command: click.Command = importlib.import_module(f"co3d_compile.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in NAMES:
            near = OTHERS.get(args[0]) or did_you_mean(args[0], NAMES) or f"There are {join(NAMES)}."
            raise click.UsageError(f"There is no command {args[0]!r}. {near}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, name="co3d", invoke_without_command=True, epilog=EPILOG)
@version_option
@click.pass_context
def main(ctx: click.Context) -> None:
    """Look at, check and run models that co3d-compile has written."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


if __name__ == "__main__":
    main()
