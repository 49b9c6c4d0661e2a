"""From predictions to events: in Python, and as ``co3d run --events`` writes and draws them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from film import Brightness, compiled, gray
from test_cli_run import one_line

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.media import read_frames, write_video

W, X, Y, Z = (0.55, 0.9, 0.7, 0.2)  # between the thresholds or not, with on = 0.6 and off = 0.5


def predictions(
    scores: Sequence[float], times: Sequence[float] | None = None, warm: int = 0
) -> Iterator[co3d.Prediction]:
    """Ten predictions a second of one class, another one beside it that is never seen."""
    for step, score in enumerate(scores):
        at = step / 10 if times is None else times[step]
        values = np.array([0.0, score], np.float32)
        yield co3d.Prediction(step, step, at, step + 2, at + 0.2, step < warm, values, ("none", "walk"), 1.0)


@pytest.mark.parametrize(
    ("scores", "options", "found"),
    [
        ([Z, X, Y, Z, Z], {}, [(0.1, 0.3)]),
        ([Z, W, X, W, Z, Z], {}, [(0.2, 0.4)]),  # hysteresis: begins at on, ends below off
        ([X, Z, X, Z], {}, [(0.0, 0.1), (0.2, 0.3)]),
        ([X, Z, X, Z], {"gap": 0.1}, [(0.0, 0.3)]),
        ([X, Z, Z, X, Z], {"gap": 0.1}, [(0.0, 0.1), (0.3, 0.4)]),
        ([X, Z, W, Z, Z], {"gap": 0.1}, [(0.0, 0.1)]),  # what would not begin an event does not go on with one
        ([X, Z, X, X, Z], {"shortest": 0.2}, [(0.2, 0.4)]),
        ([X, Z, X, Z], {"shortest": 0.2, "gap": 0.1}, [(0.0, 0.3)]),  # first joined, then measured
        ([Z, X, X], {}, [(0.1, 0.3)]),  # goes on at the end: up to where the next result would lie
        ([X, float("nan"), X], {}, [(0.0, 0.1), (0.2, 0.3)]),
        ([X, X, Z], {"classes": ["none"]}, []),
        ([X, X, Z], {"classes": {"walk": 0.95}}, []),
        ([Y, W, X], {"classes": {"walk": (0.65, 0.6), "none": None}}, [(0.0, 0.1), (0.2, 0.3)]),
        ([X, X, Z], {"classes": [1]}, [(0.0, 0.2)]),
        ([], {}, []),
    ],
)  # fmt: skip
def test_events_by_thresholds(
    scores: list[float], options: Mapping[str, Any], found: list[tuple[float, float]]
) -> None:
    events = co3d.events(predictions(scores), **{"on": 0.6, "off": 0.5, **options})
    assert [(round(event.begin, 6), round(event.end, 6)) for event in events] == found
    for event in events:
        inside = [s for at, s in enumerate(scores) if event.begin - 1e-6 <= at / 10 < event.end - 1e-6 and s == s]
        assert event.label == "walk" and event.peak == pytest.approx(max(inside))
        assert event.mean == pytest.approx(np.mean(inside))


def test_results_of_the_warm_up_and_of_another_time_belong_to_no_event() -> None:
    assert [event.begin for event in co3d.events(predictions([X] * 5, warm=3))] == [pytest.approx(0.3)]
    for times in ([0, 0.1, 9.0, 9.1], [5.0, 5.1, 0.0, 0.1]):  # a source that was away; one that began anew
        events = co3d.events(predictions([X] * 4, times))
        assert sorted((e.begin, round(e.end, 6)) for e in events) == sorted((t, t + 0.2) for t in (times[0], times[2]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on": 0.3, "off": 0.4}, "end below 0.4"),
        ({"gap": -1}, "seconds from 0"),
        ({"classes": "walk"}, "Give a list of names"),
        ({"classes": ["wlak"]}, "Did you mean walk?"),
    ],
)
def test_events_that_make_no_sense(options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(co3d.UsageError) as raised:
        co3d.events(predictions([X]), **options)
    assert says in str(raised.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film that is dark, bright from frame 40 to 59 (2 s to 3 s), dark; a model that answers 2 frames late."""
    folder = tmp_path_factory.mktemp("events")
    write_video(folder / "v.mp4", [gray(220 if 40 <= index < 60 else 30, 96, 160) for index in range(80)], 20)
    (folder / "m.onnx").write_bytes(compiled(Brightness(), preprocess={"size": 16}, labels=["bright", "dark"]))
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(*args: str) -> Result:
    return CliRunner().invoke(group, ["run", "m.onnx", "--source", "v.mp4", *args])


def test_run_writes_events_at_the_time_of_the_frames() -> None:
    result = run("--events", "e.csv", "--save", "out.mp4")
    assert result.exit_code == 0, result.output
    assert "Events" in result.stdout and "dark 2, bright 1" in result.stdout
    (event,) = [row for row in csv.DictReader(Path("e.csv").read_text().splitlines()) if row["label"] == "bright"]
    assert (float(event["begin"]), float(event["end"])) == pytest.approx((2.0, 3.0), abs=1e-3)
    assert 0.8 < float(event["mean"]) <= float(event["peak"]) < 0.9
    # The bar along the upper edge has the colour of class 0 where it was bright, once that is over.
    picture = [frame.image for frame in read_frames("out.mp4")][75]  # at 3.75 s; the bar spans 30 s
    place = [round(picture.shape[1] * (1 + (at - 3.75) / 30)) for at in (1.5, 2.5)]
    dark, bright = (picture[4, at].astype(int) for at in place)
    assert bright[2] > bright[0] + 60 and dark[0] > dark[2] + 60, (bright, dark)


def test_events_as_json_lines_of_the_classes_asked_for() -> None:
    assert run("--events", "e.jsonl", "--class", "bright=0.7,0.6").exit_code == 0
    (event,) = [json.loads(line) for line in Path("e.jsonl").read_text().splitlines()]
    assert (event["label"], event["class"], event["begin"]) == ("bright", 0, pytest.approx(2.0, abs=1e-3))
    printed = run("--events", "-", "--shortest", "1.5").stdout.splitlines()
    assert printed[0] == "label,begin,end,peak,peak_time,mean,class" and len(printed) == 2
    assert json.loads(run("--events", "e.csv", "--json").stdout)["events"] == {"dark": 2, "bright": 1}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--events", "e.csv", "--class", "brihgt"], "Did you mean bright?"),
        (["--events", "-", "--class", "zzz"], "It has 2 classes, such as bright, dark."),
        (["--events", "e.csv", "--on", "0.2", "--off", "0.3"], "end below 0.3"),
        (["--events", "e.csv", "--class", "bright=1,2,3"], "LABEL=ON,OFF"),
        (["--events", "e.csv", "--csv", "e.csv"], "same name"),
        (["--gap", "1"], "Give --events FILE too."),
    ],
)
def test_mistakes_are_one_line(args: list[str], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and says in one_line(result) and not result.stdout
