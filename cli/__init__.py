"""The commands. Each module holds one; what they share is in `common`, `output`, `progress` and `summary`."""

try:
    import click as _click  # noqa: F401
    import rich as _rich  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"error: the commands need {error.name}: pip install 'co3d-compile[compile]', or [video] to run models"
    ) from None
