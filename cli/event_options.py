"""The options that say what an event is: `co3d run --events`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from co3d_compile.cli.common import EVENTS, Options, option, together
from co3d_compile.errors import UsageError
from co3d_compile.media.events import EventFinder, Thresholds

NAMES = ("on", "off", "shortest", "gap", "event_classes")
SECONDS = click.FloatRange(min=0)

event_options = together(
    option("--on", type=float, default=0.5, show_default=True, group=EVENTS, metavar="SCORE",
           help="The score at which an event begins."),
    option("--off", type=float, group=EVENTS, metavar="SCORE",
           help="The score below which it ends. [default: 0.8 times --on]"),
    option("--shortest", type=SECONDS, default=0.0, group=EVENTS, metavar="SECONDS",
           help="Leave shorter events out."),
    option("--gap", type=SECONDS, default=0.0, group=EVENTS, metavar="SECONDS",
           help="Two events of a class so near to each other are one."),
    option("--class", "event_classes", multiple=True, group=EVENTS, metavar="LABEL[=ON[,OFF]]",
           help="A class that is looked for, with scores of its own if they are given; may be repeated. "
           "[default: all]"),
)  # fmt: skip


def take_events(options: Options) -> Callable[[], EventFinder] | None:
    """Makes a factory of finders of the events that are asked for (None: no events).

    Takes those options out of ``options``.

    Raises:
        UsageError: They make no sense, or nothing asks for events.
    """
    given = {name: options.pop(name) for name in NAMES}
    classes: dict[str | int, Thresholds | None] = dict(_class(text) for text in given.pop("event_classes"))

    def make() -> EventFinder:
        return EventFinder(**given, classes=classes or None)

    make()
    if options["events_path"] is not None:
        return make
    context = click.get_current_context()
    for name in NAMES:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError("The options of events are for --events.", hint="Give --events FILE too.")
    return None


def _class(text: str) -> tuple[str, Any]:
    name, equals, scores = text.rpartition("=")
    if not equals:
        return text, None
    try:
        numbers = tuple(float(part) for part in scores.split(","))
    except ValueError:
        return text, None  # the name of a class may hold the sign
    if len(numbers) > 2:
        raise UsageError(f"{text!r} has more than two scores.", hint="Give LABEL=ON or LABEL=ON,OFF.")
    return name, numbers if len(numbers) == 2 else numbers[0]
