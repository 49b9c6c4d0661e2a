"""The report as one web page that needs nothing else, from the data in a compiled file. Needs Jinja2, and no torch."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from types import ModuleType

from co3d_compile.contract.model_contract import Contract
from co3d_compile.contract.stored_report import reading_report
from co3d_compile.errors import Co3dError
from co3d_compile.report.facts import nothing_gained, operator_place, region_text, verification_text
from co3d_compile.report.latency import delay_rows, frames_behind, latency_texts, seconds_text
from co3d_compile.report.report_rows import Row, table
from co3d_compile.report.time_drawing import NARROW, WIDE, draw
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import bytes_text, number_text, plural

MOST_STAGES = 14
COLUMNS = ["module_path", "operator", "done", "delay", "field", "rate", "state_bytes", "macs_clip", "macs_frame"]


def page(
    report: JsonObject,
    info: Contract,
    time: JsonObject | None = None,
    verification: JsonObject | None = None,
    fps: float | None = None,
) -> str:
    """Writes the page as HTML.

    Args:
        report: What the compiler has stored in ``metadata_props["co3d_report"]``.
        info: The contract of the same file.
        time: If the report has the shares of a profile (``profile_times.with_shares``): ``milliseconds_step``, and
            ``elsewhere``, shares by name that are no operator's.
        verification: What a verification of the file has found, as JSON data; None if there was none.
        fps: Frames per second of the source. Default: what the file says.

    Raises:
        Co3dError: Jinja2 is missing. ContractError: The report is damaged.
    """
    jinja2 = page_tools()
    with reading_report(AttributeError, jinja2.TemplateError):
        context = _context(report, info, time, verification, fps or (info.preprocess or {}).get("fps"))
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("co3d_compile.report", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters.update(number=number_text, bytes=bytes_text, plural=plural, script=_script)
        text: str = environment.get_template("report.html").render(context)
    return text


def _context(
    report: JsonObject, info: Contract, time: JsonObject | None, verification: JsonObject | None, fps: float | None
) -> JsonObject:
    """Writes what the template fills in. Arguments and errors: as for ``page``."""
    rows = table(report, max(info.frames_per_step.values(), default=1))
    columns = [*COLUMNS, "time_percent"] if time is not None else COLUMNS
    return {
        "report": report,
        "time": time,
        "info": info,
        "facts": _facts(report, info, fps),
        "latency": latency_texts(json.loads(info.to_json()), fps),
        "delays": [(f"{row['frames']:+}", row) for row in delay_rows(rows)],
        "drawings": {"wide": draw(rows, WIDE), "narrow": draw(rows, NARROW)},
        "stages": _stages(rows, time),
        "steps": _steps(rows),
        "rows": [[row[name] for name in columns] for row in rows if row["kind"] != "input"],
        "verification": None if verification is None else verification_text(verification),
        "passed": verification is not None and verification["passed"],
        "warnings": [str(text) for text in report["warnings"]],
        "recomputed": info.recomputed,
        "regions": [(operator_place(asdict(item)), region_text(asdict(item))) for item in info.regions],
    }


def page_tools() -> ModuleType:
    """Imports Jinja2, or says how to get it."""
    try:
        import jinja2
    except ImportError as error:
        raise Co3dError("The page needs Jinja2.", hint=install_command("co3d-compile[report]")) from error
    return jinja2


def _facts(report: JsonObject, info: Contract, fps: float | None) -> list[tuple[str, str, str]]:
    """Writes cards: a name, a value, what it means."""
    ratio, field, first = report["gmac_ratio"], info.receptive_field, info.outputs[0]
    output = {name: getattr(first, name) for name in ("delay", "has_time", "entries_per_step", "frames_per_entry")}
    delay = frames_behind(output, dict(info.frames_per_step))[0]
    frame, clip = (number_text(1e9 * report[name]) for name in ("gmac_frame", "gmac_clip"))
    work = f"{frame} multiply-adds for a frame, {clip} for a clip"
    takes = " + ".join(str(count) for count in info.frames_per_step.values()) or "0"
    names = ", of " + ", ".join(info.frames_per_step) if len(info.frames_per_step) > 1 else ""
    whose = f"of {next(iter(info.frames_per_step))} " if names else ""
    return [
        ("Work", "none less" if nothing_gained(report) else f"{ratio:.1f}\u00d7 less" if ratio else "none", work),
        ("State", bytes_text(report["state_bytes"]), f"{plural(report['state_count'], 'tensor')} for each stream"),
        ("Receptive field", seconds_text(field, fps) if field else "unbounded", f"{whose}that a result depends on"),
        ("Delay", seconds_text(delay, fps), "from the newest frame to what the result speaks of"),
        ("Warm-up", plural(info.warmup_steps, "step"), "before results are exact"),
        ("A step takes", takes, ("frame" if takes == "1" else "frames") + names),
    ]


def _stages(rows: list[Row], time: JsonObject | None) -> JsonObject:
    """Sums over parts of the network: by as many components of the module path as keep the list short."""
    names = ["state_bytes", "macs_frame", "macs_clip"] + (["time_share"] if time is not None else [])
    depths = [d for d in range(2, 7) if len({_stage(row, d) for row in rows}) <= MOST_STAGES]
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["kind"] != "input":
            sums[_stage(row, max(depths, default=1))].update({name: row[name] for name in names})
    for name, share in (time["elsewhere"] if time is not None else {}).items():
        sums[f"{name}, of no module"].update({"time_share": share})
    most = {name: max((amounts[name] for amounts in sums.values()), default=0) or 1 for name in names}
    stages = [{"name": part, **{name: amounts[name] for name in names}} for part, amounts in sums.items()]
    return {"columns": names, "list": [s for s in stages if any(s[name] for name in names)], "most": most}


def _stage(row: Row, depth: int) -> str:
    return ".".join(row["module_path"].split(".")[:depth]) or "the model"


def _steps(rows: list[Row]) -> JsonObject:
    """Counts what each of the three steps did, and what became of the rest."""
    over_time = [row for row in rows if row["done"] == "continual"]
    held = [(row, amount) for row in rows for amount in row["held"] if amount]
    padded = [row for row in rows if row["padding"]]
    return {
        "continual": _counted(f"{row['operator']} over {row['taps']:g} {_unit(row)}" for row in over_time),
        "continual_count": len(over_time),
        "padding": _counted(f"{row['padding']:g} in front of {row['operator']}" for row in padded),
        "padding_count": len(padded),
        "held": _counted(f"{row['operator']} by {amount}" for row, amount in held),
        "held_count": len(held),
        "gates": _counted(row["done"] for row in rows if row["done"].startswith("gate")),
        "carried": sum(row["done"] == "carries its state" for row in rows),
        "window": sum(row["kind"] == "window" for row in rows),
        "untouched": sum(row["kind"] == "stream" and not row["done"] for row in rows),
    }


def _unit(row: Row) -> str:
    return "frames" if row["rate"] == 1 else "entries"


def _counted(texts: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(texts).most_common()


def _script(data: list[list[str | float | None]]) -> str:
    """Writes JSON that may stand in a script element."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
