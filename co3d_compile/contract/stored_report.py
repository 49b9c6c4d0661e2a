"""The report that a compiled file carries, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from co3d_compile.contract.model_contract import REPORT_KEY
from co3d_compile.errors import ContractError
from co3d_compile.support.plain_types import JsonObject


@contextmanager
def reading_report(*more: type[Exception]) -> Iterator[None]:
    """Blames the report in a file for what goes wrong inside: it lacks something, or holds what it should not.

    Args:
        more: What may be raised then beside Python's own errors.

    Raises:
        ContractError: The report is damaged.
    """
    expected: tuple[type[Exception], ...] = (KeyError, TypeError, ValueError, IndexError, *more)
    try:
        yield
    except expected as why:
        raise ContractError(f"The report in the file is damaged: {why!r}.", hint="Compile the model again.") from why


def stored_report(text: str | None) -> JsonObject:
    """Reads the JSON of ``metadata_props["co3d_report"]``.

    Raises:
        ContractError: There is none, or it is damaged.
    """
    if text is None:
        raise ContractError(
            "The file holds no report: it was compiled before there were any.", hint="Compile it again."
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"The report in the file ({REPORT_KEY}) is no JSON.", hint="Compile it again.") from error
    if not isinstance(data, dict):
        raise ContractError("The report in the file is no JSON object.", hint="Compile it again.")
    return data
