"""docs/troubleshooting.md quotes messages as they are printed: each is provoked here, by commands or from Python."""

from __future__ import annotations

import json
import re
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from film import Brightness, video
from model_files import FACTORY, cut, save_export, save_pickle, tiny, use_folder, write
from torch import Tensor, nn
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.cli.common import explain
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.failures import STRICT

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
CLIP = torch.zeros(1, 3, 8, 8, 8)
SHAPE = ["--shape", "1x3x4x8x8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def command(name: str, *args: str) -> str:
    """The one line on stderr of a command, without ``error:``."""
    result = CliRunner().invoke(compile_command if name == "co3d-compile" else group, list(args))
    assert result.exit_code in range(2, 7), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").strip()


def compiling(*args: str) -> str:
    return command("co3d-compile", *args, "-o", "out.onnx")


def running(*args: str) -> str:
    return command("co3d", "run", *args)


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(co3d.Co3dError) as caught:
        call()
    return str(caught.value)


def compile(model: nn.Module, clip: Tensor = CLIP, **options: Any) -> co3d.CompiledModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", co3d.Co3dWarning)
        return co3d.compile(model.eval(), (clip,), **options)


def warned(call: Callable[[], object]) -> str:
    with pytest.warns(co3d.Co3dWarning) as caught:
        call()
    return str(caught[0].message)


def session(**options: Any) -> co3d.StreamSession:
    return co3d.StreamSession(compile(tiny()), **options)


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), *layers)


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2)


class Beside(nn.Module):
    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        return x * speaker.unsqueeze(2)


class Chance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape[-1:])


class ByRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.conv, in_dims=2, out_dims=2)(x)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.numpy()))


class Memory(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + len(x.untyped_storage().tolist())


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


# --- provocations that take more than a line


def captured_for_one_clip() -> co3d.CompiledModel:
    """A transformer, whose dims of size one cannot be told apart."""
    entry = SMALL["transformer"]
    program = torch.export.export(entry.build(), entry.examples(), strict=False)
    return co3d.compile(program, time_dim=entry.time_dim, **entry.options)


def rule_with_a_bug() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STRICT)
        patch.setattr(Convolution, "strip", lambda *_: 1 // 0)
        return warned(lambda: co3d.compile(tiny().eval(), (CLIP,)))


def other_batch() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", co3d.Co3dWarning)
        compiled = captured_for_one_clip()
    return raised(lambda: co3d.StreamSession(compiled, batch=4))


def damaged_archive() -> str:
    return compiling(cut(save_export()))


def hand_made_pickle() -> str:
    return compiling(save_pickle())


def archive_with_code() -> str:
    from test_archive import with_payload

    return compiling(with_payload("pickled weight", Path("trace")))


def other_weights() -> str:
    torch.save(nn.Sequential(nn.Conv3d(3, 5, 3)).state_dict(), "w.pth")
    return compiling(f"{FACTORY}:tiny", "--weights", "w.pth", *SHAPE)


def half() -> str:
    return compiling(f"{FACTORY}:tiny", "--kwargs", '{"dtype": "float16"}', *SHAPE)


def state_dict() -> str:
    torch.save(tiny().state_dict(), "w.pth")
    return compiling("w.pth")


def onnx_for_torch() -> str:
    compile(tiny()).save("m.onnx")
    return compiling("m.onnx")


def script_that_does_not_convert() -> str:
    torch.jit.script(Branch()).save("m.ts")
    return compiling("m.ts", *SHAPE)


def two_threads() -> str:
    one, inside, leave = session(), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        leave.wait(20)

    frame = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", wait)
        thread = threading.Thread(target=one.step, args=(frame,))
        thread.start()
        try:
            assert inside.wait(20)
            return raised(lambda: one.step(frame))
        finally:
            leave.set()
            thread.join()


def without_metadata() -> str:
    compile(tiny()).save("m.onnx")
    model = onnx.load("m.onnx")
    del model.metadata_props[:]
    onnx.save(model, "m.onnx")
    return raised(lambda: co3d.StreamSession("m.onnx"))


def for_another_processor() -> str:
    compile(tiny()).save("m.onnx")
    model = onnx.load("m.onnx")
    for entry in model.metadata_props:
        if entry.key == "co3d":
            entry.value = json.dumps({**json.loads(entry.value), "native": 5})
    onnx.save(model, "m.onnx")
    return raised(lambda: co3d.StreamSession("m.onnx"))


def snapshot_of_another() -> str:
    blob = session().snapshot()
    return raised(lambda: co3d.StreamSession(compile(pooled())).restore(blob))


def run_on(model: nn.Module, *args: str, clip: Tensor = CLIP, **options: Any) -> str:
    compile(model, clip, **options).save("m.onnx")
    video(Path("v.mp4"), 4)
    return running("m.onnx", "--source", "v.mp4", *args)


def no_video() -> str:
    compile(Brightness(), torch.zeros(1, 3, 8, 16, 16)).save("m.onnx")
    write(b"text", "v.mp4")
    return running("m.onnx", "--source", "v.mp4")


def no_display() -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            patch.delenv(name, raising=False)
        return run_on(Brightness(), "--show", clip=torch.zeros(1, 3, 8, 16, 16))


def without(package: str, call: Callable[[], object]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        return raised(call)


def another_model() -> str:
    torch.manual_seed(0)
    compile(tiny(), torch.zeros(1, 3, 4, 8, 8)).save("m.onnx")
    torch.manual_seed(1)
    path = save_export("m.pt2", nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()).eval())
    return command("co3d", "verify", "m.onnx", "--against", path)


def a_stranger() -> str:
    from co3d_compile.verification.verify_model import verify

    compile(tiny()).save("m.onnx")
    return raised(lambda: verify("m.onnx", tiny().eval(), (torch.rand(1, 3, 8, 9, 9),)))


def by_chance() -> str:
    from co3d_compile.verification.verify_model import verify

    compile(Chance()).save("m.onnx")
    return raised(lambda: verify("m.onnx", Chance(), (torch.rand(1, 3, 8, 8, 8),)))


CASES: dict[str, Callable[[], str]] = {
    # loading and capture
    "state dict": state_dict,
    "pickle": hand_made_pickle,
    "archive with code": archive_with_code,
    "truncated": damaged_archive,
    "git lfs": lambda: compiling(write(b"version https://git-lfs.github.com/spec/v1\n")),
    "onnx": onnx_for_torch,
    "no module": lambda: compiling("nowhere.at_all:model", *SHAPE),
    "no shape": lambda: compiling(f"{FACTORY}:tiny"),
    "weights that do not fit": other_weights,
    "nan": lambda: compiling(f"{FACTORY}:diverged", *SHAPE),
    "half": half,
    "clip refused": lambda: compiling(f"{FACTORY}:Short", *SHAPE),
    "two clips": lambda: compiling(f"{FACTORY}:TwoClips", *SHAPE),
    "script": script_that_does_not_convert,
    "branch": lambda: raised(lambda: compile(Branch())),
    "numpy": lambda: raised(lambda: compile(Numpy())),
    "memory": lambda: raised(lambda: compile(Memory())),
    "vmap": lambda: raised(lambda: compile(ByRows())),
    # time and shapes
    "exported for": lambda: compiling(save_export(), "--shape", "1x3x8x8x8"),
    "time dim": lambda: raised(lambda: compile(tiny(), time_dim=5)),
    "time dim not said": lambda: raised(
        lambda: co3d.compile(Beside().eval(), (torch.zeros(1, 3, 8), torch.zeros(1, 3))),
    ),
    "time dim of channels": lambda: raised(lambda: compile(tiny(), time_dim=1)),
    "time dims": lambda: raised(lambda: compile(tiny(), time_dim=[2, 2])),
    "frames per step": lambda: raised(
        lambda: compile(nn.Conv3d(3, 4, 3, (2, 1, 1), 1), frames_per_step=3),
    ),
    "window": lambda: raised(lambda: compile(pooled(nn.Flatten(), nn.Linear(4 * 8 * 64, 2)), window=16)),
    # unsupported
    "rule with a bug": rule_with_a_bug,
    "no extension": lambda: compiling(f"{FACTORY}:Flip", *SHAPE, "--unsupported", "error"),
    "dense": lambda: raised(
        lambda: compile(pooled(nn.Upsample(scale_factor=(2, 1, 1))), stride_mode="dense"),
    ),
    "dense and exact": lambda: raised(lambda: compile(tiny(), stride_mode="dense", boundary="exact")),
    "ends": lambda: raised(
        lambda: compile(nn.Conv3d(3, 4, 3, padding=1, padding_mode="reflect"), boundary="exact"),
    ),
    "batch": lambda: warned(captured_for_one_clip),
    "no window": lambda: warned(lambda: co3d.compile(tiny(), (CLIP,), window=4)),
    "no time": lambda: warned(lambda: co3d.compile(nn.Conv3d(3, 4, (1, 3, 3)), (CLIP,))),
    # output and running
    "no directory": lambda: command(
        "co3d-compile", f"{FACTORY}:tiny", *SHAPE, "-o", str(Path("no", "m.onnx")),
    ),
    "not compiled": without_metadata,
    "cut off": lambda: raised(lambda: co3d.StreamSession(b"cut off")),
    "provider": lambda: raised(lambda: session(providers=["CUDAExecutionProvider"])),
    "dtype": lambda: raised(lambda: session().step(np.zeros((1, 3, 8, 8)))),
    "shape": lambda: raised(lambda: session().step(np.zeros((1, 3, 9, 8), np.float32))),
    "other batch": other_batch,
    "native": for_another_processor,
    "two threads": two_threads,
    "snapshot": snapshot_of_another,
    "flush": lambda: raised(lambda: session().flush()),
    "no video": no_video,
    "no scores": lambda: run_on(tiny()),
    "channels": lambda: run_on(nn.Conv3d(5, 4, 3), clip=torch.zeros(1, 5, 8, 8, 8)),
    "labels": lambda: run_on(
        Brightness(), "--labels", write(b"a\nb\nc\n", "l.txt"), clip=torch.zeros(1, 3, 8, 16, 16),
    ),
    "display": no_display,
    "no PyTorch": lambda: explain(ModuleNotFoundError("No module named 'torch'", name="torch"))[0],
    "no PyAV": lambda: without("av", lambda: list(co3d.read_source("v.mp4"))),
    "no Jinja2": lambda: without("jinja2", lambda: compile(tiny()).to_html()),
    # verification
    "stranger": a_stranger,
    "differs": another_model,
    "chance": by_chance,
}  # fmt: skip


def quoted() -> list[str]:
    """Every message on the page."""
    return re.findall(r"^```text\n(.+)\n```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def fits(message: str, quote: str) -> bool:
    return re.fullmatch(".+?".join(map(re.escape, quote.split("\u2026"))), message, re.DOTALL) is not None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_message_is_on_the_page_as_it_is_printed(case: Callable[[], str]) -> None:
    message = case()
    found = [quote for quote in quoted() if fits(message, quote)]
    assert len(found) == 1, f"{message!r} is {found or 'not'} on the page"


def test_every_message_on_the_page_is_provoked() -> None:
    """One case for each; that they fit is the test above."""
    assert len(quoted()) == len(set(quoted())) == len(CASES)


def test_the_page_is_one_message_a_line() -> None:
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [block.strip() for block in blocks] == quoted()
