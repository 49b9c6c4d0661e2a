"""``co3d run`` and what ``co3d-compile`` stores for it, as a user calls them, on really encoded videos."""

from __future__ import annotations

import csv
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
from click.testing import CliRunner, Result
from film import Brightness, compiled, gray, level_of, ramp, video
from model_files import save_export, use_folder
from PIL import Image
from torch import Tensor

from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group
from co3d_compile.media.video import read_frames, write_video

CO3D = [sys.executable, "-m", "co3d_compile.cli.main", "run", "m.onnx"]


@pytest.fixture(scope="module")
def model() -> bytes:
    return compiled(preprocess={"size": 16}, labels=["bright", "dark"])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: bytes) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(model)
    video(tmp_path / "v.mp4")
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(group, ["run", "m.onnx", *args])


def one_line(result: Result) -> str:
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def hidden() -> list[str]:
    return [name for name in os.listdir() if name.startswith(".")]


def test_a_file_becomes_predictions_in_every_form() -> None:
    result = run("--source", "v.mp4", "--save", "out.mp4", "--csv", "out.csv", "--jsonl", "out.jsonl", "--top", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert not any(line.endswith(" ") for line in result.stdout.splitlines())
    for words in ("Warming up", "40 in", "Predictions", "bright", "out.mp4, out.csv, out.jsonl"):
        assert words in result.stdout
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 38
    for row, line in zip(rows, lines, strict=True):
        assert (int(row["frame"]), float(row["time"])) == (line["frame"], line["time"])
        assert line["time"] == pytest.approx(line["frame"] / 20, abs=1e-3)
        assert line["newest_frame"] - line["frame"] == 2
        if row["warmup"] == "0":
            level = level_of(line["frame"])
            assert float(row["score_1"]) == pytest.approx(max(level, 1 - level), abs=0.02)
            assert row["label_1"] == line["top"][0]["label"] == ("bright" if level > 0.5 else "dark")
    assert [row["warmup"] for row in rows].count("1") > 0
    assert len(list(read_frames("out.mp4"))) == 40
    assert not hidden()


def test_the_summary_as_json_stands_alone_on_stdout() -> None:
    result = json.loads(run("--source", "v.mp4", "--json", "--frames", "30", "--fps", "10").stdout)
    assert result["frames"] == 30 and result["frames_taken"] == 15 and result["frames_skipped"] == 15
    assert result["predictions"] == 13 and result["frames_dropped"] == 0
    assert sum(each["share"] for each in result["classes"]) == pytest.approx(1)


def test_predictions_on_stdout_and_nothing_else() -> None:
    lines = [json.loads(line) for line in run("--source", "v.mp4", "--jsonl", "-").stdout.splitlines()]
    assert len(lines) == 38
    assert run("--source", "v.mp4", "--csv", "-").stdout.startswith("time,frame,")


def test_options_go_before_the_file_s_metadata() -> None:
    Path("names").write_text("hell\ndunkel\n")
    result = run("--source", "v.mp4", "--jsonl", "-", "--labels", "names", "--value-range", "1,0")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["top"][0]["label"] == "dunkel"  # black and white are exchanged
    assert last["top"][0]["score"] == pytest.approx(level_of(last["frame"]), abs=0.02)


def test_a_model_without_preprocessing_is_told_of(here: Path) -> None:
    (here / "m.onnx").write_bytes(compiled())
    result = run("--source", "v.mp4")
    assert result.exit_code == 0 and "does not say how pictures are prepared" in result.stderr


def test_a_folder_and_a_pipe(here: Path) -> None:
    folder = here / "pictures"
    folder.mkdir()
    for index, image in enumerate(ramp(15)):
        header = f"P6 {image.shape[1]} {image.shape[0]} 255\n".encode()
        (folder / f"{index}.ppm").write_bytes(header + image.tobytes())
    lines = run("--source", "pictures", "--source-fps", "5", "--jsonl", "-").stdout.splitlines()
    assert json.loads(lines[-1])["time"] == pytest.approx(12 / 5)
    piped = subprocess.run(
        [*CO3D, "--source", "-", "--json"], input=video(here / "v.ts").read_bytes(), capture_output=True, check=True
    )
    assert json.loads(piped.stdout)["frames"] == 40


def test_pictures_that_change_their_size_are_said(here: Path) -> None:
    parts = [write_video(here / "p.ts", [gray(90, h, 2 * h)] * 20, 20).read_bytes() for h in (32, 64)]
    (here / "both.ts").write_bytes(b"".join(parts))
    result = run("--source", "both.ts", "--save", "out.mp4")
    assert result.exit_code == 0
    assert "now 128x64 pixels" in result.stdout and "1 change of size" in result.stdout
    assert len(list(read_frames("out.mp4"))) == 40
    (here / "pictures").mkdir()
    for index in range(20):
        Image.new("RGB", (40 + index % 2, 30)).save(f"pictures/{index}.png")
    result = run("--source", "pictures")
    assert result.stdout.count("the pictures are now") < 5 and "19 changes of size" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--source", "missing.mp4"], 4, "missing.mp4"),
        (["--source", "m.onnx"], 4, "cannot be read as a video"),
        (["--source", "63"], 4, "no camera"),
        (["--source", "rtsp://127.0.0.1:1/none"], 4, "rtsp://127.0.0.1:1/none"),
        (["--source", "-"], 2, "standard input"),
        (["--source", "v.mp4", "--show"], 2, "display"),
        (["--source", "v.mp4", "--save", "no/such/out.mp4"], 6, "no"),
        (["--source", "v.mp4", "--save", "out.unknown"], 6, "error: out.unknown cannot be written as a video"),
        (["--source", "v.mp4", "--save", "out"], 6, "End its name with .mp4 or .mkv"),
        (["--source", "v.mp4", "--csv", "m.onnx"], 2, "model itself"),
        (["--source", "v.mp4", "--labels", "v.mp4", "--jsonl", "v.mp4"], 2, "itself"),
        (["--source", "v.mp4", "--save", "v.mp4"], 2, "source itself"),
        (["--source", "v.mp4", "--save", "-"], 2, "standard output"),
        (["--source", "v.mp4", "--csv", "x", "--jsonl", "x"], 2, "same name"),
        (["--source", "v.mp4", "--labels", "missing"], 4, "labels"),
        (["--source", "v.mp4", "--size", "8"], 2, "crop"),
        (["--source", "v.mp4", "--size", "big"], 2, "big"),
        (["--source", "v.mp4", "--mean", "a,b"], 2, "numbers"),
        (["--source", "v.mp4", "--layout", "NTCHW"], 2, "layout"),
        (["--source", "v.mp4", "--source-fps", "3"], 2, "folder"),
        (["--source", "v.mp4", "--output-name", "y"], 2, "no output"),
        (["--source", "v.mp4", "--provider", "None"], 2, "provider"),
        ([], 2, "--source"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    before = sorted(os.listdir())
    result = run(*args)
    assert result.exit_code == code, result.output
    assert says in one_line(result)
    assert sorted(os.listdir()) == before


def test_a_model_that_is_not_compiled_yet_is_told_of(here: Path) -> None:
    save_export("m.onnx")
    result = run("--source", "v.mp4")
    assert result.exit_code == 4 and "compile it with co3d-compile first" in one_line(result)


def test_a_source_that_ends_too_early_says_so(here: Path) -> None:
    for frames, says in (("4", "all of them while warming up"), ("2", "none: the source is shorter")):
        result = run("--source", "v.mp4", "--frames", frames)
        assert result.exit_code == 0 and says in result.stdout, result.output


def test_a_model_of_another_kind_is_refused(here: Path) -> None:
    (here / "m.onnx").write_bytes(b"nothing")
    assert run("--source", "v.mp4").exit_code == 4
    assert CliRunner().invoke(group, ["run", "missing.onnx", "--source", "v.mp4"]).exit_code == 4


def test_a_source_that_breaks_off_leaves_what_came_before(here: Path) -> None:
    whole = write_video(here / "v.avi", [gray(i) for i in range(10, 210)], 20).read_bytes()
    (here / "cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    result = run("--source", "cut.avi", "--jsonl", "out.jsonl", "--save", "out.mp4")
    assert result.exit_code in (0, 4)  # whether a decoder calls it an end or an error is its own affair
    count = len(Path("out.jsonl").read_text().splitlines())
    assert 10 < count < 200
    assert len(list(read_frames("out.mp4"))) >= count
    assert not hidden()


class Feed:
    """A command that reads an endless video from its standard input."""

    def __init__(self, args: list[str], **options: Any) -> None:
        self.process = subprocess.Popen([*CO3D, "--source", "-", *args], stdin=subprocess.PIPE, **options)
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

    def give(self, content: bytes, seconds: float) -> None:
        """Writes and waits, as a camera does."""
        assert self.process.stdin is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if content and select.select([], [self.process.stdin], [], 0.05)[1]:
                content = content[os.write(self.process.stdin.fileno(), content[:65536]) :]
            else:
                time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_finishes_the_files_though_the_source_keeps_silent(here: Path, number: int, code: int) -> None:
    film = write_video(here / "v.ts", ramp(40) * 3, 20).read_bytes()
    args = ["--save", "out.mp4", "--csv", "out.csv", "--jsonl", "-"]
    with open("stdout", "wb") as out, open("stderr", "wb") as err:
        feed = Feed(args, stdout=out, stderr=err)
        for _ in range(200):  # a guard
            feed.give(film, 0.3)
            film = b""
            if (here / "stdout").stat().st_size > 2000:
                break
        feed.process.send_signal(number)
        assert feed.process.wait(300) == code
    assert "complete up to there" in (here / "stderr").read_text()
    rows = len(Path("out.csv").read_text().splitlines()) - 1
    assert rows == len((here / "stdout").read_text().splitlines()) > 10
    assert len(list(read_frames("out.mp4"))) >= rows
    assert not hidden()


@pytest.mark.slow
def test_ctrl_c_while_a_source_is_opened(here: Path) -> None:
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/film.mp4"
        command = subprocess.Popen([*CO3D, "--source", url, "--csv", "out.csv"], stderr=subprocess.PIPE, text=True)
        server.settimeout(120)
        with server.accept()[0]:
            time.sleep(0.3)
            command.send_signal(signal.SIGINT)
            said = command.communicate(timeout=300)[1]
    assert (command.returncode, said) == (130, "stopped by SIGINT; nothing was written\n")
    assert not Path("out.csv").exists() and not hidden()


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(here: Path) -> None:
    write_video(here / "long.mp4", ramp(40) * 20, 20)
    for what, lines in (("--jsonl -", 2), ("", 1)):
        command = " ".join([*CO3D, "--source", "long.mp4", what])
        piped = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} | head -n {lines}"], capture_output=True, text=True, check=False
        )
        assert (piped.returncode, len(piped.stdout.splitlines()), piped.stderr) == (141, lines, "")
    for command in ("inspect m.onnx -v", "inspect m.onnx --json", "run m.onnx --source v.mp4 --json"):
        line = f"set -o pipefail; {' '.join(CO3D[:3])} {command} | (exec 0<&-)"
        piped = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (piped.returncode, piped.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect m.onnx", "inspect m.onnx --json", "run m.onnx --source v.mp4 --json"])
def test_a_full_disk_behind_standard_output_is_no_bug(command: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*CO3D[:3], *command.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    said = "error: The output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (6, said)


@pytest.mark.slow
def test_a_terminal_gets_a_line_per_second_and_a_bar(here: Path) -> None:
    write_video(here / "long.mp4", ramp(40) * 2, 20)
    main, end = pty.openpty()
    # As if a second went by with every frame: how many do is the machine's affair.
    code = "from co3d_compile.cli import run_display, main; run_display.EVERY = 0.0; main.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *CO3D[CO3D.index("run") :], "--source", "long.mp4"],
        stdout=end, stderr=end, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    os.close(end)
    seen = b""
    try:
        while chunk := os.read(main, 65536):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait(300) == 0
    text = seen.decode()
    assert "Warming up" in text and "frame " in text and " fps" in text and "/80" in text and "left" in text


def test_compile_stores_what_run_needs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folder(tmp_path_factory.mktemp("compile"), monkeypatch)
    from torch import nn

    network = nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    Path("names.json").write_text('{"walk": 0, "run": 1}')
    stored = ["--size", "10x12", "--mean", "0.4,0.5,0.6", "--std", "0.2", "--fps", "12.5", "--labels", "names.json"]
    args = [save_export(model=network), "-o", "out.onnx", *stored]
    result = CliRunner().invoke(compile_command, args)
    assert (result.exit_code, result.stderr) == (0, "")
    info = json.loads(CliRunner().invoke(group, ["inspect", "out.onnx", "--json"]).stdout)
    assert info["labels"] == ["walk", "run"]
    wanted = {"size": [10, 12], "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "fps": 12.5, "channels": "rgb"}
    assert {name: info["preprocess"][name] for name in wanted} == wanted
    for bad in (["--std", "0"], ["--labels", "m.bin"], ["--layout", "CTHW"], ["--value-range", "1"]):
        result = CliRunner().invoke(compile_command, [*args[:3], *bad])
        assert result.exit_code in (2, 4) and one_line(result)


def test_a_profile_of_the_run() -> None:
    result = run("--source", "v.mp4", "--profile", "p.json")
    assert result.exit_code == 0 and "p.json" in result.stdout
    assert "ms per step" in CliRunner().invoke(group, ["inspect", "m.onnx", "--profile", "p.json"]).stdout
    assert "Two outputs have the same name" in one_line(run("--source", "v.mp4", "--csv", "a", "--profile", "a"))
    assert run("--source", "v.mp4", "--profile", "no/p.json").exit_code == 6
    assert not hidden()


class Undefined(Brightness):
    """Its scores are no numbers."""

    def forward(self, clip: Tensor) -> Tensor:
        return super().forward(clip) * float("nan")


def test_scores_that_are_no_numbers_are_written_as_none(here: Path) -> None:
    (here / "m.onnx").write_bytes(compiled(Undefined(), preprocess={"size": 16}))
    result = run("--source", "v.mp4", "--jsonl", "out.jsonl", "--csv", "out.csv", "--save", "out.mp4", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["predictions"] == 38
    for line in Path("out.jsonl").read_text().splitlines():
        assert {rank["score"] for rank in json.loads(line)["top"]} == {None}


def lying(path: Path, frames: int) -> Path:
    """An AVI whose headers claim this many frames; it has 40."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for image in ramp(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    total, length = content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32
    for place in (total, length):
        assert int.from_bytes(content[place : place + 4], "little") == 40
        content[place : place + 4] = frames.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("frames", [0, 1, 39, 2**31 - 1])
def test_videos_that_lie_about_their_length_are_read_to_their_end(frames: int, here: Path) -> None:
    lying(here / "lie.avi", frames)
    result = run("--source", "lie.avi", "--save", "out.mp4", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["frames"] == 40
    assert len(list(read_frames(here / "out.mp4"))) == 40


def test_a_video_that_is_cut_off_gives_what_it_holds(here: Path) -> None:
    content = lying(here / "lie.avi", 40).read_bytes()
    (here / "cut.avi").write_bytes(content[: len(content) // 2])
    result = run("--source", "cut.avi", "--csv", "out.csv", "--json")
    assert result.exit_code in (0, 4)
    assert 10 < json.loads(result.stdout)["frames"] < 30
    assert Path("out.csv").exists()
