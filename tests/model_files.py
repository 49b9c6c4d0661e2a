"""Models as files and factories, good and bad, for the tests of loading and of the commands."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SHAPE = (1, 3, 4, 8, 8)
FACTORIES = """
import torch
from torch import nn

def tiny(width=4, training=False, dtype="float32", device="cpu"):
    with torch.device(device):
        model = nn.Sequential(nn.Conv3d(3, width, 3, padding=1), nn.ReLU())
    return model.train(training).to(getattr(torch, dtype))

def diverged():
    model = tiny()
    model[0].weight.data[0, 0, 0, 0, 0] = float("nan")
    return model

class TwoClips(nn.Module):
    def forward(self, slow, fast):
        return slow.mean() + fast.mean()

class ListOfClips(nn.Module):
    def forward(self, clips):
        assert isinstance(clips, list)
        return clips[0].mean() + clips[1].mean()

class OnePathway(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 2)
    def forward(self, x, boxes=None):
        return self.fc(self.conv(x[0]).mean((2, 3, 4)))

class OnGpu(nn.Module):
    def forward(self, x):
        return x.cuda().relu()

def built_on_gpu():
    return tiny().cuda()

class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.AvgPool3d((16, 1, 1))
    def forward(self, x):
        return self.head(x)

class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(0)

class Flip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
    def forward(self, x):
        return self.conv(x).flip(2)

class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
    def forward(self, *, video):
        return self.conv(video).relu()

class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def still():
    return nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU())

ready = tiny()
def number(): return 3
def fails(): raise ValueError("no such checkpoint")
def leaves(): raise SystemExit(9)
def scripted(): return torch.jit.trace(tiny(), torch.randn(1, 3, 4, 8, 8))
"""
FACTORY = "co3d_test_factories"


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()).eval()


def files() -> set[str]:
    """What lies in the folder, without the modules of `use_folder`."""
    return {name for name in os.listdir() if not name.startswith(("co3d_test", "__pycache__"))}


def use_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a current directory with factories in it."""
    (tmp_path / f"{FACTORY}.py").write_text(FACTORIES)
    (tmp_path / "co3d_test_broken.py").write_text("import co3d_no_such_module\n")
    (tmp_path / "co3d_test_raises.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in [FACTORY, "co3d_test_broken", "co3d_test_raises"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def save_onnx() -> str:
    """An ONNX clip model of a network of this kind, with names of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU()).eval()
    names = {"input_names": ["video"], "output_names": ["maps"]}
    torch.onnx.export(network, (torch.zeros(SHAPE),), "clip.onnx", dynamo=False, opset_version=17, **names)
    return "clip.onnx"


def save_export(path: str = "m.bin", model: nn.Module | None = None, clip: Tensor | None = None) -> str:
    clip = torch.randn(SHAPE) if clip is None else clip
    program = torch.export.export(model or tiny(), (clip,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    Path(path).write_bytes(buffer.getvalue())
    return path


def save_labels() -> str:
    """A model, and a file of labels beside it."""
    Path("l.txt").write_text("cat")
    return save_export()


def save_script(path: str = "m.bin") -> str:
    torch.jit.trace(tiny(), torch.randn(SHAPE)).save(path)
    return path


def save_pickle(path: str = "m.bin", content: object = None, **kwargs: Any) -> str:
    torch.save(tiny() if content is None else content, path, **kwargs)
    return path


def write(content: bytes, path: str = "m.bin") -> str:
    Path(path).write_bytes(content)
    return path


def cut(path: str) -> str:
    return write(Path(path).read_bytes()[: Path(path).stat().st_size // 2], path)


def rewrite(path: str, changes: dict[str, Callable[[bytes], bytes]], more: dict[str, bytes] | None = None) -> str:
    """Changes the members of an archive whose names end so, and adds more."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    root = next(iter(members)).split("/")[0]
    for end, change in changes.items():
        name = next(name for name in members if name.endswith(end))
        members[name] = change(members[name])
    members |= {f"{root}/{name}": content for name, content in (more or {}).items()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    return path


def zip_of_text(name: str = "readme.txt") -> str:
    with zipfile.ZipFile("plain.bin", "w") as file:
        file.writestr(name, "hello")
    return "plain.bin"
