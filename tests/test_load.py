"""Every way a model can be given, and every way in which it can be bad."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import (
    FACTORY,
    SHAPE,
    cut,
    rewrite,
    save_export,
    save_pickle,
    save_script,
    tiny,
    use_folder,
    write,
    zip_of_text,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

import co3d_compile as co3d
from co3d_compile.capture.load_model import load
from co3d_compile.errors import CaptureError, Co3dError, LoadError, UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def outputs(program: Any, inputs: tuple[Any, ...]) -> Tensor:
    module = program.module() if isinstance(program, ExportedProgram) else program
    with torch.no_grad():
        result: Tensor = module(*inputs)
    return result


# The kind is found from the content: every file here is called m.bin.
@pytest.mark.parametrize(
    ("make", "options", "kind"),
    [
        (save_export, {}, "torch.export archive"),
        (save_export, {"shapes": [SHAPE]}, "torch.export archive"),
        (save_script, {"shapes": [SHAPE]}, "TorchScript file"),
        (save_pickle, {"shapes": [SHAPE], "trust_pickle": True}, "pickled module"),
        (lambda: save_pickle(_use_new_zipfile_serialization=False), {"shapes": [SHAPE], "trust_pickle": True},
         "pickled module"),
        (lambda: f"{FACTORY}:tiny", {"shapes": [SHAPE]}, f"factory {FACTORY}:tiny"),
        (lambda: f"{FACTORY}:ready", {"shapes": [SHAPE]}, f"factory {FACTORY}:ready"),
        (lambda: f"{FACTORY}:scripted", {"shapes": [SHAPE]}, f"factory {FACTORY}:scripted"),
    ],
    ids=["export", "export+shape", "script", "pickle", "old pickle", "factory", "module", "factory of script"],
)  # fmt: skip
def test_sources(make: Callable[[], str], options: dict[str, Any], kind: str) -> None:
    loaded = load(make(), **options)
    assert loaded.kind == kind
    assert tuple(loaded.example_inputs[0].shape) == SHAPE
    assert outputs(loaded.program, loaded.example_inputs).shape == (1, 4, 4, 8, 8)


@pytest.mark.parametrize("make", [save_export, save_script])
def test_weights_survive(make: Callable[[], str]) -> None:
    loaded = load(make(), shapes=[SHAPE])
    got, want = outputs(loaded.program, loaded.example_inputs), outputs(tiny(), loaded.example_inputs)
    torch.testing.assert_close(got, want)


def test_clip_is_the_same_every_time() -> None:
    first, second = (load(f"{FACTORY}:tiny", shapes=[SHAPE]).example_inputs[0] for _ in range(2))
    assert torch.equal(first, second)


def test_training_mode_is_told() -> None:
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], kwargs={"training": True})
    assert not loaded.program.training  # type: ignore[union-attr]
    assert any("training mode" in note for note in loaded.notes)


def test_the_clip_is_not_changed_by_the_model() -> None:
    assert load(f"{FACTORY}:InPlace", shapes=[SHAPE]).example_inputs[0].abs().max() > 0


@pytest.mark.parametrize(("factory", "as_list"), [("TwoClips", False), ("ListOfClips", True)])
def test_calling_convention(factory: str, as_list: bool) -> None:
    loaded = load(f"{FACTORY}:{factory}", shapes=[SHAPE, (1, 3, 16, 8, 8)])
    clips = loaded.example_inputs[0] if as_list else loaded.example_inputs
    assert isinstance(loaded.example_inputs[0], list) is as_list
    assert [tuple(c.shape) for c in clips] == [SHAPE, (1, 3, 16, 8, 8)]


def test_a_single_clip_in_a_list() -> None:
    """As the networks of PySlowFast take it; the clip itself binds to their signature too."""
    loaded = load(f"{FACTORY}:OnePathway", shapes=[SHAPE])
    assert isinstance(loaded.example_inputs[0], list) and "in a list" in loaded.notes[-1]


@pytest.mark.parametrize(
    "content", [tiny(), {"epoch": 3, "net": tiny()}, nn.DataParallel(tiny())], ids=["", "in", "dp"]
)
def test_whole_modules(content: object) -> None:
    """As a model, and as weights of one."""
    torch.save(content, "w.bin")
    for model, how in (("w.bin", {}), (f"{FACTORY}:tiny", {"weights": Path("w.bin")})):
        loaded = load(model, shapes=[SHAPE], trust_pickle=True, **how)  # type: ignore[arg-type]
        got, want = outputs(loaded.program, loaded.example_inputs), outputs(tiny(), loaded.example_inputs)
        torch.testing.assert_close(got, want)


NET = "from .blocks import block\nimport helper\n\ndef build(width):\n    return block(width + helper.more)\n"
BLOCKS = "from torch import nn\n\ndef block(width):\n    return nn.Conv3d(3, width, 3)\n"


@pytest.mark.parametrize("folder", ["here", "../v1.0"])
@pytest.mark.parametrize("package", [True, False])
def test_a_factory_in_a_file(folder: str, package: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package, with or without its ``__init__``; what lies beside the file is found as for a script."""
    name = f"co3d_test_{package}_{len(folder)}"
    at = Path(folder) / f"{name}_project" / name
    at.mkdir(parents=True)
    if package:
        (at / "__init__.py").touch()
        (at.parent / "__init__.py").touch()
    relative = package or folder == "here"
    (at / f"{name}_net.py").write_text(NET if relative else NET.replace("from .blocks", "from blocks"))
    (at / "blocks.py").write_text(BLOCKS)
    (at / "helper.py").write_text("more = 1\n")
    for module in ("blocks", "helper"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for start in (at, at.resolve()):
        loaded = load(f"{start}/{name}_net.py:build", shapes=[SHAPE], kwargs={"width": 4})
        assert outputs(loaded.program, loaded.example_inputs).shape[1] == 5


def on_a_gpu(path: str) -> str:
    """An archive as it is written where the network is on a GPU."""

    def elsewhere(content: bytes) -> bytes:
        return re.sub(rb'"type": ?"cpu", ?"index": ?null', b'"type": "cuda", "index": 0', content)

    def saved(content: bytes) -> bytes:
        Path("inside.pt").write_bytes(content)
        rewrite("inside.pt", {"data.pkl": lambda b: b.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")})
        return Path("inside.pt").read_bytes()

    return rewrite(path, {"model.json": elsewhere, "weights_config.json": elsewhere, "sample_inputs/model.pt": saved})


class OnItsDevice(nn.Module):
    """A network whose code makes tensors where its input is: the device stands in the archive."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.arange(4, device=x.device).view(4, 1, 1, 1)


def test_an_archive_that_was_written_on_a_gpu() -> None:
    torch.manual_seed(0)
    network = OnItsDevice().eval()
    loaded = load(on_a_gpu(save_export(model=network)))
    assert loaded.notes == ["the program was exported on cuda; it is read for the CPU"]
    got, want = outputs(loaded.program, loaded.example_inputs), outputs(network, loaded.example_inputs)
    torch.testing.assert_close(got, want)


def weights_of(content: object) -> dict[str, Any]:
    torch.save(content, "w.bin")
    return {"weights": Path("w.bin")}


def numbers_for_lists(content: bytes) -> bytes:
    """A program whose list of inputs is a number."""
    program = json.loads(content)
    program["graph_module"]["graph"]["inputs"] = 3
    return json.dumps(program).encode()


BAD: list[tuple[str, Callable[[], str], Callable[[], dict[str, Any]], type[Co3dError], str]] = [
    ("no file", lambda: "nothing.pt2", dict, LoadError, "no file nothing.pt2"),
    ("directory", lambda: ".", dict, LoadError, "not a file"),
    ("empty", lambda: write(b""), dict, LoadError, "is empty"),
    ("text", lambda: write(b"hello"), dict, LoadError, "no model"),
    ("Python", lambda: write(b"import torch\n", "net.py"), dict, LoadError, "net.py:NAME"),
    ("web page", lambda: write(b"<!DOCTYPE html><html>"), dict, LoadError, "web page"),
    ("lfs pointer", lambda: write(b"version https://git-lfs.github.com/spec/v1\n"), dict, LoadError, "git lfs pull"),
    ("onnx", lambda: write(b"\x08\x0a\x12\x07pytorch\x1a\x053.0.0:\x10"), dict, LoadError, "ONNX"),
    ("plain zip", zip_of_text, dict, LoadError, "holds no PyTorch model"),
    ("old archive", lambda: zip_of_text("serialized_exported_program.json"), dict, LoadError, "2.7 or older"),
    ("truncated export", lambda: cut(save_export()), dict, LoadError, "truncated or damaged"),
    ("truncated script", lambda: cut(save_script()), dict, LoadError, "truncated or damaged"),
    ("truncated pickle", lambda: cut(save_pickle()), dict, LoadError, "truncated or damaged"),
    ("damaged export", lambda: rewrite(save_export(), {"model.json": lambda b: b[: len(b) // 2]}), dict, LoadError,
     "truncated or damaged"),
    ("incomplete export", lambda: rewrite(save_export(), {"model.json": lambda b: b"{}"}), dict, LoadError,
     "cannot be opened"),
    ("a number for the program", lambda: rewrite(save_export(), {"model.json": lambda b: b"3"}), dict, LoadError,
     "cannot be opened"),
    ("a number for a list", lambda: rewrite(save_export(), {"model.json": numbers_for_lists}), dict, LoadError,
     "cannot be opened"),
    ("pickle", save_pickle, dict, LoadError, "--trust-pickle"),
    ("old pickle", lambda: save_pickle(_use_new_zipfile_serialization=False), dict, LoadError, "--trust-pickle"),
    ("trusted number", lambda: save_pickle(content=3), lambda: {"trust_pickle": True}, LoadError, "holds a int"),
    ("trusted garbage", lambda: write(b"\x80\x02garbage"), lambda: {"trust_pickle": True}, LoadError, "damaged"),
    ("state dict", lambda: save_pickle(content=tiny().state_dict()), dict, LoadError, "holds weights"),
    ("trusted state dict", lambda: save_pickle(content=tiny().state_dict()), lambda: {"trust_pickle": True}, LoadError,
     "holds weights"),
    ("several modules", lambda: save_pickle(content={"net": tiny(), "ema": tiny()}), lambda: {"trust_pickle": True},
     LoadError, "holds several modules (net, ema)"),
    ("checkpoint", lambda: save_pickle(content={"state_dict": tiny().state_dict()}), dict, LoadError, "holds weights"),
    ("safetensors", lambda: save_file(tiny().state_dict(), "m.bin") or "m.bin", dict, LoadError, "holds weights"),
    ("export, other shape", save_export, lambda: {"shapes": [(1, 3, 8, 8, 8)]}, UsageError, "exported for 1x3x4x8x8"),
    ("export, weights", save_export, lambda: {"weights": Path("w.bin")}, UsageError, "--weights"),
    ("export, half", lambda: save_export(model=tiny().half(), clip=torch.randn(SHAPE).half()), dict, LoadError,
     "float16"),
    ("script, no shape", save_script, lambda: {"shapes": []}, UsageError, "--shape"),
    ("script, refused", save_script, lambda: {"shapes": [(1, 4, 4, 8, 8)]}, CaptureError,
     "refuses a clip of 1x4x4x8x8"),
    ("factory, no shape", lambda: f"{FACTORY}:tiny", lambda: {"shapes": []}, UsageError, "--shape"),
    ("huge shape", lambda: f"{FACTORY}:tiny", lambda: {"shapes": [(1, 3, 10**6, 10**6, 10**6)]}, UsageError, "4 GiB"),
    ("zero shape", lambda: f"{FACTORY}:tiny", lambda: {"shapes": [(1, 3, 0, 8, 8)]}, UsageError, "makes no sense"),
    ("no module", lambda: "co3d_nothing:tiny", dict, LoadError, "no module named co3d_nothing"),
    ("broken import", lambda: "co3d_test_broken:tiny", dict, LoadError, "no module named co3d_no_such_module"),
    ("import raises", lambda: "co3d_test_raises:tiny", dict, LoadError, "at import"),
    ("no function", lambda: f"{FACTORY}:tinny", dict, LoadError, "Did you mean tiny"),
    ("raises", lambda: f"{FACTORY}:fails", dict, LoadError, "ValueError: no such checkpoint"),
    ("leaves", lambda: f"{FACTORY}:leaves", dict, LoadError, "fails: SystemExit"),
    ("no nn.Module", lambda: f"{FACTORY}:number", dict, LoadError, "gave a int"),
    ("no factory", lambda: f"{FACTORY}:FACTORIES", dict, LoadError, "has no FACTORIES"),
    ("no such Python file", lambda: "mine/net.py:build", dict, LoadError, "There is no file"),
    ("another module of that name", lambda: write(b"a = 3", "torch.py") + ":a", dict, LoadError, "another module"),
    ("on a GPU", lambda: f"{FACTORY}:OnGpu", dict, CaptureError, "x.device"),
    ("built on a GPU", lambda: f"{FACTORY}:built_on_gpu", dict, LoadError, "x.device"),
    ("key without weights", lambda: f"{FACTORY}:tiny", lambda: {"weights_key": "ema"}, UsageError, "--weights FILE"),
    ("unknown kwargs", lambda: f"{FACTORY}:tiny", lambda: {"kwargs": {"classes": 3}}, LoadError, "classes"),
    ("kwargs for a module", lambda: f"{FACTORY}:ready", lambda: {"kwargs": {"a": 3}}, LoadError, "a model already"),
    ("half", lambda: f"{FACTORY}:tiny", lambda: {"kwargs": {"dtype": "float16"}}, LoadError, "model.float()"),
    ("bfloat16", lambda: f"{FACTORY}:tiny", lambda: {"kwargs": {"dtype": "bfloat16"}}, LoadError, "model.float()"),
    ("meta", lambda: f"{FACTORY}:tiny", lambda: {"kwargs": {"device": "meta"}}, LoadError, "device meta"),
    ("diverged", lambda: f"{FACTORY}:diverged", dict, LoadError, "NaN or infinity"),
    ("refused clip", lambda: f"{FACTORY}:tiny", lambda: {"shapes": [(1, 4, 4, 8, 8)]}, CaptureError, "[0]"),
    ("short clip", lambda: f"{FACTORY}:Short", dict, CaptureError, "[head]"),
    ("number of clips", lambda: f"{FACTORY}:TwoClips", dict, CaptureError, "one --shape per input"),
    ("no weights", lambda: f"{FACTORY}:tiny", lambda: {"weights": Path("none.pt")}, LoadError, "No such file"),
    ("weights missing", lambda: f"{FACTORY}:tiny", lambda: weights_of({"0.bias": torch.zeros(4)}), LoadError,
     "1 missing: 0.weight"),
    ("weights unexpected", lambda: f"{FACTORY}:tiny",
     lambda: weights_of({**tiny().state_dict(), "head.bias": torch.zeros(4)}), LoadError, "1 unexpected: head.bias"),
    ("weights of another shape", lambda: f"{FACTORY}:tiny",
     lambda: {"kwargs": {"width": 5}, **weights_of(tiny().state_dict())}, LoadError, "0.bias (4, the model has 5)"),
    ("weights pickled", lambda: f"{FACTORY}:tiny", lambda: weights_of(tiny()), LoadError, "model.state_dict()"),
    ("weights of nothing", lambda: f"{FACTORY}:tiny", lambda: weights_of({"epoch": 3}), LoadError, "no state dict"),
    ("weights truncated", lambda: f"{FACTORY}:tiny",
     lambda: {"weights": Path(cut(save_pickle("w.bin", tiny().state_dict())))}, LoadError, "truncated or damaged"),
    ("weights in an archive", lambda: f"{FACTORY}:tiny", lambda: {"weights": Path(save_export("w.bin"))}, LoadError,
     "Give it as the model"),
    ("weights that are a pointer", lambda: f"{FACTORY}:tiny",
     lambda: {"weights": Path(write(b"version https://git-lfs.github.com/spec/v1\n", "w.bin"))}, LoadError,
     "git lfs pull"),
    ("weights that are a picture", lambda: f"{FACTORY}:tiny",
     lambda: {"weights": Path(write(b"\x89PNG\r\n\x1a\n", "w.bin"))}, LoadError, "holds no weights"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "kind", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_models(
    make: Callable[[], str], options: Callable[[], dict[str, Any]], kind: type[Co3dError], says: str
) -> None:
    shapes = {} if make in (save_export,) else {"shapes": [SHAPE]}
    with pytest.raises(kind) as caught:
        load(make(), **{**shapes, **options()})
    assert type(caught.value) is kind
    assert says in str(caught.value)


@pytest.mark.slow
def test_torchvision_whose_operators_do_not_load() -> None:
    """In a process of its own: whatever torchvision is installed, its video models are there."""
    code = (
        "from co3d_compile.capture.load_model import load\n"
        "shape = [(1, 3, 4, 16, 16)]\n"
        "print(load('torchvision.models.video:mc3_18', shapes=shape, kwargs={'num_classes': 5}).kind)\n"
        "print(load('torchvision.models.video:r3d_18', shapes=shape).kind)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[:2] == [f"factory torchvision.models.video:{m}" for m in ("mc3_18", "r3d_18")], (
        result.stderr
    )


def diverged() -> nn.Module:
    model = tiny()
    with torch.no_grad():
        model[0].bias[1] = float("inf")  # type: ignore[index]
    return model


def test_weights_that_are_no_numbers_are_refused_wherever_they_come_from() -> None:
    model = diverged()
    torch.jit.trace(model, torch.randn(SHAPE)).save("m.ts")
    torch.save(model.state_dict(), "w.pth")
    for load_it in (
        lambda: load(save_export("m.pt2", model)),
        lambda: load("m.ts", shapes=[SHAPE]),
        lambda: load(f"{FACTORY}:tiny", weights=Path("w.pth"), shapes=[SHAPE]),
    ):
        with pytest.raises(LoadError, match=r"^0\.bias contains NaN or infinity"):
            load_it()
    with pytest.raises(CaptureError, match=r"The parameter 0\.bias contains NaN or infinity"):
        co3d.compile(model, (torch.randn(SHAPE),))


def test_what_is_returned_beside_tensors_is_left_out() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv3d(3, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"loss": None, "logits": self.net(x), "stages": [self.net(x).mean((2, 3, 4)), 3]}

    compiled = co3d.compile(Several().eval(), (torch.zeros(1, 3, 4, 8, 8),))
    assert [output.name for output in compiled.info.outputs] == ["logits", "stages_0"]
    assert [output.has_time for output in compiled.info.outputs] == [True, False]
