"""What is known of each operator, and the page that is made of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from local_networks import CLIP, LOCAL
from local_networks import network as with_part
from model_files import FACTORY, save_export, use_folder
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group
from co3d_compile.contract.model_contract import REPORT_KEY
from co3d_compile.contract.read_contract import parse
from co3d_compile.contract.stored_report import stored_report
from co3d_compile.errors import ContractError
from co3d_compile.report.report_rows import table
from co3d_compile.report.time_drawing import NARROW, draw
from co3d_compile.report.web_page import page


class Block(nn.Module):
    """A residual block with a gate, as in X3D."""

    def __init__(self, taps: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, (taps, 3, 3), padding=(taps // 2, 1, 1))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(4, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.relu(x + y * self.gate(y))


class Recurrent(nn.Module):
    """A layer that never forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class Attention(nn.Module):
    """Every frame looks at every other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 4, 4), padding=(1, 0, 0))
        self.look = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        return torch.mean(self.look(y, y, y)[0], 1)


def network(*middle: nn.Module) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv3d(3, 4, (5, 1, 1), padding=(2, 0, 0)), *middle, head).eval()


class Last(nn.Module):
    """The answer is about the last entry."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x[:, :, -1], (2, 3))


NETWORKS = {
    "last entry": nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), Last()).eval(),
    "residual": network(Block(), Block(5)),
    "strided": network(nn.Conv3d(4, 4, 3, (2, 1, 1), 1), Block(), nn.MaxPool3d((2, 1, 1))),
    "dilated": network(nn.Conv3d(4, 4, (3, 1, 1), dilation=(3, 1, 1))),
    "up": network(
        nn.Conv3d(4, 4, (2, 1, 1), (2, 1, 1)), nn.Upsample(scale_factor=(2, 1, 1)), nn.Conv3d(4, 4, (3, 1, 1))
    ),
    "no head": nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), Block()).eval(),
    "window gate": network(Block()),
    "exact": network(Block()),
    "dense": network(nn.Conv3d(4, 4, 3, (2, 1, 1), 1), nn.Conv3d(4, 4, 3, padding=1)),
}
OPTIONS = {"window gate": {"pool_scope": "window"}, "exact": {"boundary": "exact"}, "dense": {"stride_mode": "dense"}}


def compiled(name: str) -> co3d.CompiledModel:
    return co3d.compile(NETWORKS[name], (torch.rand(1, 3, 16, 8, 8),), **OPTIONS.get(name, {}))  # type: ignore[arg-type]


def metadata(model: co3d.CompiledModel) -> dict[str, str]:
    found: dict[str, str] = ort.InferenceSession(model.to_bytes()).get_modelmeta().custom_metadata_map
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_each_operator_s_facts_add_up_to_those_of_the_model(name: str) -> None:
    """The frames seen follow operator by operator from the index equations, the contract's from the step graph."""
    model = compiled(name)
    rows, info, report = model.program.notes.survey, model.info, model.report()
    last = rows[-1]
    assert last.field is not None and info.receptive_field is not None
    # Behind an up-sampling not every entry of a group reads as far back as the farthest.
    assert 0 <= last.field - info.receptive_field <= (2 if name == "up" else 0)
    assert last.delay == info.outputs[0].delay * (info.outputs[0].frames_per_entry or 1)
    assert sum(row.macs_clip for row in rows) == round(report.gmac_clip * 1e9)
    assert sum(row.macs_step for row in rows) == round(report.gmac_step * 1e9)
    assert sum(row.state_bytes for row in rows) == report.state_bytes


def test_the_drawing_fits_a_screen_of_390_pixels() -> None:
    """Names, bars and delays, however long the names are: a letter of 11.5 pixels is seldom wider than 6.6."""
    model = compiled("residual")
    rows = table(stored_report(metadata(model)[REPORT_KEY]), 1)
    for row in rows:
        row["module_path"] = "blocks.2.res_blocks." * 5 + row["module_path"]
    drawing = draw(rows, NARROW)
    assert drawing.width <= 390 - 2 * (12 + 10 + 1)  # margins of the page, of the panel, its border
    for lane in drawing.lanes:
        assert 6 + 8 + 6.6 * len(lane.name + lane.operator) <= drawing.width and len(lane.name) > 20
        left, width = lane.seen
        assert min(left, *lane.dots, 6) >= 0 and max(left + width, *lane.dots, lane.now) < drawing.width - 8 - 2 * 6.6
    assert all(x + 6.6 * len(text) <= drawing.width for _, x, _, text in drawing.delays)
    assert drawing.lanes[-1].y < drawing.height


def test_a_recurrent_layer_has_seen_all(folder: Path) -> None:
    """Its own entries stand still, yet each depends on every frame before it."""
    save_export("m.pt2", Recurrent(), torch.rand(1, 6, 4))
    for more in (["--html", "page.html"], []):
        result = CliRunner().invoke(group, ["inspect", "m.pt2", "--time-dim", "1", *more])
        assert result.exit_code == 0, result.stderr
    assert "gru  carries its state  delay 0, sees all, 20 B" in result.stdout
    page = Path("page.html").read_text("utf-8")
    assert "1 recurrent operator, with a state" in page and "<h1>Recurrent, frame by frame</h1>" in page
    assert "1 operators" not in page and "1 frames" not in page


def test_the_tree_has_every_state(folder: Path) -> None:
    """What runs again on a window remembers too."""
    model = co3d.compile(Attention().eval(), (torch.rand(1, 3, 6, 4, 4),))
    model.save("out.onnx")
    text = CliRunner().invoke(group, ["inspect", "out.onnx"]).stdout
    with_state = [row for row in model.program.notes.survey if row.state_bytes]
    assert {row.kind for row in with_state} == {"stream", "window"}
    assert all(f"{row.operator.removeprefix('aten.')}  {row.done}" in text for row in with_state)
    assert sum(f", {row.state_bytes} B" in text for row in with_state) == len(with_state)


def test_the_three_steps_stand_at_their_operators() -> None:
    rows = compiled("residual").program.notes.survey
    assert [row.done for row in rows if row.operator == "aten.add"] == ["operand delayed by 1", "operand delayed by 2"]
    assert [(r.taps, r.padding, r.delay) for r in rows if r.done == "continual"] == [(5, 2, 2), (3, 1, 3), (5, 2, 5)]
    assert [row.done for row in rows if row.operator == "aten.mean"][:2] == ["gate over one frame"] * 2
    add = next(row for row in rows if row.operator == "aten.add")
    assert {rows[at].operator: held for at, held in zip(add.inputs, add.held, strict=True)} == {
        "aten.conv3d": 1,
        "aten.mul": 0,
    }


class Page(HTMLParser):
    """The tags and texts of a page, and all it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "rect", "circle", "path", "br"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", NETWORKS)
def test_the_page_is_whole_and_loads_nothing(name: str) -> None:
    text = compiled(name).to_html()
    parsed = Page(text)
    assert parsed.open == [] and parsed.loads == []
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert "nan" not in re.sub(r"<script>.*", "", text, flags=re.DOTALL).lower().split()
    assert parsed.tags.count("circle") > 2


def test_the_page_is_the_same_from_the_file_and_from_memory() -> None:
    model = compiled("residual")
    stored = metadata(model)
    assert page(stored_report(stored[REPORT_KEY]), parse(stored["co3d"])) == model.to_html()
    assert stored == metadata(compiled("residual")), "nothing in the file depends on the time of day"


def test_names_from_elsewhere_cannot_become_markup() -> None:
    model = compiled("residual")
    stored = metadata(model)
    data = stored_report(stored[REPORT_KEY])
    evil = "</script><script>alert(1)</script><b>&"
    data["table"][3]["module_path"] = data["model"] = data["table"][3]["operator"] = evil
    data["warnings"] = [evil]
    text = page(data, parse(stored["co3d"]))
    assert "<script>alert" not in text and "<b>&" not in text
    assert Page(text).tags.count("script") == 1


def damage(data: dict[str, Any], what: str) -> None:
    rows = data["table"]
    if what == "no table":
        del data["table"]
    elif what == "table of numbers":
        data["table"] = [1, 2]
    elif what == "endless delay":
        rows[2]["delay"] = 1e300
    elif what == "text for a number":
        rows[2]["taps"] = "many"
    elif what == "many taps":
        rows[2]["taps"] = 1e9
    elif what == "input that is not there":
        rows[2]["inputs"] = [10**6]


@pytest.mark.parametrize(
    "what",
    ["no table", "table of numbers", "endless delay", "text for a number", "many taps", "input that is not there"],
)
def test_damaged_reports_are_an_error(what: str) -> None:
    stored = metadata(compiled("no head"))
    data = stored_report(stored[REPORT_KEY])
    damage(data, what)
    with pytest.raises(ContractError, match="damaged"):
        page(data, parse(stored["co3d"]))
    for text in (None, "{", "[]", "[" * 100_000):
        with pytest.raises(ContractError, match="report"):
            stored_report(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def test_inspect_and_compile_write_the_page(folder: Path) -> None:
    archive = save_export(model=NETWORKS["residual"], clip=torch.rand(1, 3, 16, 8, 8))
    result = CliRunner().invoke(compile_command, [archive, "-o", "out.onnx", "--report", "one.html"])
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(group, ["inspect", "out.onnx", "--html", "two.html"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "two.html written\n", "")
    shown = CliRunner().invoke(group, ["inspect", "out.onnx"]).stdout
    for words in ("What the compiler changed", "conv  conv3d  continual", "delayed by 1"):
        assert words in shown
    verified, stored = ((folder / name).read_text() for name in ("one.html", "two.html"))
    note = re.search(r'<div class="note"><b>Verification passed</b>: .*</div>\n', verified)
    assert note is not None and "the network with 2 gates over one frame (pool_scope=frame), up to" in note[0]
    assert verified.replace(note[0], "") == stored
    everything = CliRunner().invoke(group, ["inspect", "out.onnx", "-v"]).stdout
    assert "sigmoid" in everything and "next.state" in everything
    code = "import sys; sys.modules['torch'] = None; from co3d_compile.cli.main import main; main()"
    command = [sys.executable, "-c", code, "inspect", "out.onnx", "--html", "three.html"]
    subprocess.run(command, check=True, capture_output=True)
    assert (folder / "three.html").read_text() == stored


def test_what_is_local_is_told_with_its_reach_and_cost(folder: Path) -> None:
    model = co3d.compile(with_part(LOCAL["mask -inf"][0]()), CLIP)
    ((name, text),) = [fact for fact in model.report().facts() if fact[0].startswith("local in time")]
    assert name.startswith("local in time: aten.") and name.endswith(" in part")
    assert re.fullmatch(r"each entry reads 1 before and 2 after; run on 4 entries, [1-9].* multiply-adds", text)
    place = name.partition(": ")[2]
    assert f"<b>{place}</b> is local in time, and streams: {text}</div>" in model.to_html()
    model.save("local.onnx")
    shown = " ".join(CliRunner().invoke(group, ["inspect", "local.onnx"]).stdout.split())
    assert "Local in time: run on a few entries at every step" in shown and place in shown and text in shown
    (region,) = json.loads(CliRunner().invoke(group, ["inspect", "local.onnx", "--json"]).stdout)["regions"]
    assert (region["before"], region["after"], region["entries"]) == (1, 2, 4) and region["multiply_adds"] > 0


@pytest.mark.parametrize("frames", [1, 2])
def test_where_nothing_is_gained_it_is_said(frames: int) -> None:
    """All of it runs again on a window at every step."""
    model = nn.Sequential(Flip(), nn.Conv3d(3, 4, 3, padding=1)).eval()
    with pytest.warns(co3d.Co3dWarning, match="Nothing gained: a step computes as much as a clip, because aten.flip"):
        found = co3d.compile(model, (torch.rand(1, 3, 8, 6, 6),), frames_per_step=frames)
    facts = dict(found.report().facts())
    assert "nothing gained: a step computes as much as a clip" in facts["multiply-adds"]
    assert "Nothing gained" in found.to_html() and "\u00d7 less" not in found.to_html()
    assert "times fewer" in dict(compiled("residual").report().facts())["multiply-adds"]


class Flip(nn.Module):
    """Turns time around."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2)


def test_a_model_is_inspected_before_it_is_compiled(folder: Path) -> None:
    for args in ([save_export()], [f"{FACTORY}:tiny", "--shape", "1x3x4x8x8"]):
        result = CliRunner().invoke(group, ["inspect", *args])
        assert result.exit_code == 0 and "conv3d  continual" in result.stdout, result.stderr
        result = CliRunner().invoke(group, ["inspect", *args, "--html", "page.html"])
        assert result.exit_code == 0 and (folder / "page.html").exists(), result.stderr


def test_inspect_s_mistakes_are_one_line(folder: Path) -> None:
    save_export("m.pt2")
    CliRunner().invoke(compile_command, ["m.pt2", "-o", "out.onnx"])
    for args, code in (
        (["out.onnx", "--html", "no/page.html"], 6),
        (["missing.onnx"], 4),
        ([f"{FACTORY}:nothing", "--shape", "1x3x4x8x8"], 4),
        (["."], 4),
        (["out.onnx", "--html", "out.onnx"], 2),
        (["m.pt2", "--html", "m.pt2"], 2),
        (["m.pt2", "--time-dim", "x"], 2),
    ):
        result = CliRunner().invoke(group, ["inspect", *args])
        assert result.exit_code == code and result.stderr.count("\n") == 1, result.stderr
    assert json.loads(CliRunner().invoke(group, ["inspect", "out.onnx", "--json", "-v"]).stdout)["report"]["table"]
