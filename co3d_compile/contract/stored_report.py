"""The report that a compiled file carries, as JSON."""

from __future__ import annotations

import json
from typing import Any

from co3d_compile.contract.model_contract import REPORT_KEY
from co3d_compile.errors import ContractError


def damaged_report(why: BaseException | None = None) -> ContractError:
    """Returns the error for a report that lacks something or holds what it should not."""
    what = f": {why!r}" if why is not None else ""
    return ContractError(f"The report in the file is damaged{what}.", hint="Compile the model again.")


def stored_report(text: str | None) -> dict[str, Any]:
    """Returns the JSON of ``metadata_props["co3d_report"]``.

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
