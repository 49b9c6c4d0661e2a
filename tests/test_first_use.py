"""What someone meets who has just installed the package: nothing but the base, a misspelt word, a look at an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from film import compiled as compiled_film
from hand_made import fir, pair
from PIL import Image

import co3d_compile as co3d
from co3d_compile.contract.model_contract import InputSpec
from co3d_compile.errors import UsageError
from co3d_compile.media.predictor import Prediction
from co3d_compile.media.preprocess import check_names, preprocess_for, stored_preprocess
from co3d_compile.media.video import resize
from co3d_compile.support import install_hint
from co3d_compile.support.install_hint import install_command

# Only what the base brings, and what that brings: everything else is not there.
ROBOT = """
import sys
HERE = {"co3d_compile", "numpy", "onnxruntime", "click", "rich", "markdown_it", "mdurl", "pygments"}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in HERE and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def on_a_robot(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ROBOT + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], ["doctor"], ["inspect", "m.onnx"], ["run", "--help"], ["serve", "--help"]],
    ids=" ".join,
)
def test_commands_of_the_base(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(fir())
    done = on_a_robot(f"from co3d_compile.cli.main import main; main({words!r})", tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    if words == ["doctor"]:
        assert "self-test" in done.stdout.lower() and install_command("co3d-compile[compile]") in done.stdout.replace(
            "\n", ""
        )


def test_compile_without_pytorch_is_one_line(tmp_path: Path) -> None:
    done = on_a_robot(
        "import co3d_compile as co3d\ntry: co3d.compile\nexcept co3d.Co3dError as error: print(error)", tmp_path
    )
    said = f"co3d_compile.compile needs torch, which is not installed. {install_command('co3d-compile[compile]')}\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("insepct", "Did you mean inspect?"),
        ("compile", "Did you mean co3d-compile?"),
        ("help", "Did you mean co3d --help?\n"),
        ("xyz", "There are run, inspect, "),
        ("--verison", "Did you mean --version? Try co3d --help."),
        ("inspect m.onnx --jsn", "Did you mean --json? Try co3d inspect --help."),
    ],
)
def test_misspelt_commands_and_options(word: str, said: str) -> None:
    command = [sys.executable, "-m", "co3d_compile", *word.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    kind = "option" if "--" in word else "command"
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: There is no {kind} {word.split()[-1]!r}. {said}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_names_of_preprocessing_are_checked() -> None:
    """What a user gives; what a newer compiler has stored is skipped."""
    spec = InputSpec("x", ("N", 3, 16, 16), "float32", 1, 2)
    for name, hint in (("Std", "Did you mean std?"), ("means", "Did you mean mean?"), ("zzz", "It has crop, size, ")):
        with pytest.raises(UsageError, match=f"Preprocessing has no '{name}'.*") as raised:
            stored_preprocess(spec, None, {name: 0.5})
        assert raised.value.hint is not None and raised.value.hint.startswith(hint)
        assert stored_preprocess(spec, {name: 0.5}, {}) == preprocess_for(spec)
    check_names(preprocess_for(spec).to_dict())


def test_the_hint_installs_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkout, a wheel, a repository and an index; pip takes each as it is printed."""

    def installed_from(origin: object) -> str:
        text = None if origin is None else json.dumps(origin)
        monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
        return install_command("co3d-compile[video]")

    assert install_command("co3d-compile[video]") == f"pip install -e '{Path(__file__).parents[1]}[video]'"
    monkeypatch.setattr(install_hint, "CHECKOUT", Path("/nowhere"))
    assert installed_from({"url": "file:///my%20folder", "dir_info": {}}) == "pip install '/my folder[video]'"
    assert installed_from({"url": "file:///c-1-py3.whl", "archive_info": {}}) == "pip install '/c-1-py3.whl[video]'"
    repository = {"url": "https://host/c.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    assert installed_from(repository) == "pip install 'co3d-compile[video] @ git+https://host/c.git'"
    assert installed_from(None) == "pip install 'co3d-compile[video]'"
    assert install_command("onnx") == "pip install onnx"


def test_objects_are_short_to_look_at() -> None:
    session = co3d.StreamSession(fir(), batch=2)
    assert repr(session).startswith("<StreamSession: 2 streams; x (N, 2, 3) -> y (N, 2, 3); receptive field ")
    session.close()
    assert "closed" in repr(session)
    info = repr(co3d.StreamSession(pair()).info)
    assert info.startswith("<Contract: fast (N, 4, 2), slow (N, 2), gain (N, 1) -> a ") and "unbounded" in info
    scores = np.array([0.1, 0.2, 0.7], np.float32)
    prediction = Prediction(3, 5, 0.5, 6, 0.6, False, scores, ("a", "b", "c"), 1.0)
    assert repr(prediction) == "<Prediction of frame 5 at 0.50 s: c 0.70, b 0.20, a 0.10>"


@pytest.mark.slow
def test_verify_is_one_function_under_both_paths() -> None:
    code = "from co3d_compile.verify import verify; import co3d_compile as co3d; print(co3d.verify is verify)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_pictures_of_any_size_are_pushed_without_pyav(tmp_path: Path) -> None:
    """On a robot the camera gives arrays, and nothing decodes a video."""
    from film import compiled

    (tmp_path / "m.onnx").write_bytes(compiled(preprocess={"size": 20}))
    code = (
        "import numpy as np, co3d_compile as co3d\n"
        "from co3d_compile.media.video import VideoFrame\n"
        "predictor = co3d.Predictor('m.onnx')\n"
        "for n in range(12):\n"
        "    for p in predictor.push(VideoFrame(np.full((48, 64, 3), 204, np.uint8), n / 20, n)): pass\n"
        "print(round(float(p.scores[0] / (p.scores[0] + p.scores[1])), 2), 'av' in __import__('sys').modules)"
    )
    done = on_a_robot(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "0.8 False\n"), done.stderr


def test_numpy_resizes_as_ffmpeg_does(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[0:97, 0:131]
    image = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), x + y], -1).astype(np.uint8)
    for height, width in ((40, 60), (160, 200), (97, 60), (33, 131)):
        by_ffmpeg = resize(image, height, width).astype(int)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "av", None)
            by_numpy = resize(image, height, width).astype(int)
        assert by_numpy.shape == by_ffmpeg.shape and np.abs(by_numpy - by_ffmpeg).mean() < 2


@pytest.mark.parametrize("name", ["co3d", "co3d-compile"])
def test_the_shell_completes_commands(name: str) -> None:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    program = Path(sys.executable).with_name(name)
    environment = {**os.environ, variable: "bash_source"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert variable in done.stdout and "complete" in done.stdout, done.stderr


def test_paths_that_every_system_runs_import_nothing_of_posix_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios', 'pty'): sys.modules[name] = None\n"
        "import os, co3d_compile as co3d\n"
        "if hasattr(os, 'sched_getaffinity'): del os.sched_getaffinity\n"
        "from co3d_compile.support.memory import peak_memory\n"
        "from co3d_compile.cli import bench, doctor, inspect, run\n"
        "print(doctor._cores() > 0, peak_memory() >= 0, co3d.StreamSession.__name__, co3d.Predictor.__name__)"
    )
    command = [
        sys.executable,
        "-c",
        "import sys, click, numpy, onnxruntime, rich.console; sys.platform = 'win32'\n" + code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True True StreamSession Predictor\n"), done.stderr


def test_any_onnx_file_is_inspected(tmp_path: Path) -> None:
    """One that is no clip model: what it takes and gives, and why it is not compiled."""
    import onnx
    from click.testing import CliRunner

    from co3d_compile.cli.main import main as group

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "plain.onnx")
    result = CliRunner().invoke(group, ["inspect", str(tmp_path / "plain.onnx")])
    assert result.exit_code == 0 and "x (N) tensor(float)" in result.stdout, result.output
    assert "Compiles  no: " in result.stdout
    data = json.loads(CliRunner().invoke(group, ["inspect", str(tmp_path / "plain.onnx"), "--json"]).stdout)
    assert data["compiles"] is False and data["outputs"][0]["name"] == "y"


class Draws(torch.nn.Module):
    """Functional dropout, which drops in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv1d(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.body(x), 0.5)


CLIP = torch.zeros(1, 2, 8)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": CLIP}, "example_inputs is a dict"),
        ((CLIP.numpy(),), r"Give tensors: torch.from_numpy"),
        ((), "with inputs of shape none"),
    ],
    ids=["dict", "numpy", "nothing"],
)
def test_what_is_given_in_place_of_a_clip(inputs: Any, says: str) -> None:
    with pytest.raises(co3d.Co3dError, match=says):
        co3d.compile(Draws().eval(), inputs)


def test_a_tensor_is_the_only_argument_of_a_clip() -> None:
    network = torch.nn.Conv1d(2, 3, 3, padding=1).eval()
    assert co3d.verify(co3d.compile(network, CLIP), network, CLIP).passed


def test_a_network_that_draws_by_chance_is_told_where() -> None:
    network = Draws().eval()
    compiled = co3d.compile(network, (CLIP,))
    with pytest.raises(co3d.VerificationError, match=r"aten\.\w*dropout in the model draws by chance"):
        co3d.verify(compiled, network, (CLIP,))


def test_reports_read_well() -> None:
    network = torch.nn.Conv1d(2, 3, 3, padding=1).eval()
    compiled = co3d.compile(network, (CLIP,))
    assert "warm-up: 2 steps" in repr(compiled.report())
    found = co3d.verify(compiled, network, (CLIP,))
    assert repr(found).startswith("<Verification passed, relative error") and len(repr(found)) < 200


@cache
def film() -> bytes:
    return compiled_film()


def test_a_picture_alone_is_a_frame() -> None:
    pictures = [np.full((48, 64, 3), 12 * n, np.uint8) for n in range(20)]
    kinds: list[Callable[[int], Any]] = [
        lambda n: co3d.VideoFrame(pictures[n], n / 30, n),
        lambda n: pictures[n],
        lambda n: Image.fromarray(pictures[n]),
        lambda n: Image.fromarray(pictures[n]).convert("L"),
        lambda n: co3d.VideoFrame(pictures[n], n / 30, n) if n < 9 else pictures[n],
    ]
    found = []
    for kind in kinds:
        with co3d.Predictor(film()) as predictor:
            found.append([p for n in range(20) for p in predictor.push(kind(n))])
            assert predictor.restarts == 0
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one.frame, one.newest_frame, one.warmup) == (two.frame, two.newest_frame, two.warmup)
            assert one.time == pytest.approx(two.time)
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)


def test_pictures_alone_come_at_the_models_rate_or_at_their_own() -> None:
    picture = np.full((48, 64, 3), 99, np.uint8)
    with co3d.Predictor(film(), preprocess={"fps": 10}) as predictor:
        for _ in range(12):
            predictor.push(picture)
        assert (predictor.frames, predictor.skipped, predictor.repeated) == (12, 0, 0)
        predictor.reset()
        for n in range(12):
            predictor.push(picture, time=n / 20)
        assert predictor.skipped == 6


@pytest.mark.parametrize(
    "picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), "a.png"]
)
@pytest.mark.parametrize("timed", [False, True])
def test_what_is_no_picture(picture: Any, timed: bool) -> None:
    with pytest.raises(UsageError, match=r"A picture is an array \(height, width, 3\)"):
        co3d.Predictor(film()).push(co3d.VideoFrame(picture, 0.0, 0) if timed else picture)
