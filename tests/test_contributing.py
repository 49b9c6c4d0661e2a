"""The pages for people who change the compiler: they are as the code is, and their patches do what they say."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCH = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Run in the patched copy: a line per patch. Without its patch none of these lines would be reached.
CHECK = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

import co3d_compile as co3d

assert Path(co3d.__file__).is_relative_to(Path.cwd()), co3d.__file__


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 6, 6), padding=(1, 0, 0))
        self.register_buffer("prototypes", torch.rand(5, 4))


class KnownFamily(Network):
    def forward(self, x):
        return torch.triu(self.conv(x).transpose(1, 3))


class NewFamily(Network):
    def forward(self, x):
        return torch.cdist(self.conv(x).flatten(2).transpose(1, 2), self.prototypes)


class DropOnes(Network):
    def forward(self, x):
        return self.conv(x) * 1


torch.manual_seed(0)
video = torch.rand(1, 3, 12, 6, 6)
for kind, time in ((KnownFamily, 2), (NewFamily, 1), (DropOnes, 2)):
    network = kind().eval()
    compiled = co3d.compile(network, (video[:, :, :8],))
    session = co3d.StreamSession(compiled)
    assert not session.info.recomputed, kind
    assert "Mul" not in [node.op_type for node in compiled.model.graph]
    (delay,) = session.info.delays.values()
    stream = [session.step(video[:, :, t].numpy()) for t in range(12)]
    with torch.no_grad():
        whole = network(video).numpy()
    for t in range(session.info.warmup_steps, 12):
        np.testing.assert_allclose(stream[t], whole.take(t - delay, time), rtol=1e-4, atol=1e-5)
    print(kind.__name__, "streams")

from click.testing import CliRunner

from co3d_compile.capture.load_model import load
from co3d_compile.cli.main import main

compiled.save("model.onnx")
done = CliRunner().invoke(main, ["export", "model.onnx", "--bundle", "out"])
assert done.exit_code == 0 and {p.name for p in Path("out").iterdir()} == {"model.onnx", "contract.json"}, done.output
print("a target is written")

arguments = '{"in_channels": 3, "out_channels": 4, "kernel_size": 3}'
Path("recipe.json").write_text('{"factory": "torch.nn:Conv3d", "kwargs": %s}' % arguments)
try:
    load("recipe.json", shapes=[(1, 3, 8, 6, 6)])
except co3d.LoadError as error:
    assert "names code to run" in str(error)
assert isinstance(load("recipe.json", shapes=[(1, 3, 8, 6, 6)], trust_pickle=True).program, nn.Conv3d)
print("a format is read")
"""


OPENING = re.compile(r"(?!Returns)[A-Z][a-z]+s[,;.:]?|The|An?|All|What")
"""A verb that says what a function does, or the noun for what it gives; "Returns" says neither."""


def functions_that_open_with_neither(path: Path) -> list[str]:
    """Lists the functions of a file whose docstring begins with no verb and no noun; a property has the noun alone.

    Commands are left out: theirs is what ``--help`` says.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        first = (ast.get_docstring(node) or "Says").split()[0]
        if not re.search("property|click", decorators) and not OPENING.fullmatch(first):
            found.append(f"{path.relative_to(ROOT)}: {node.name}: {first} …")
    return found


def test_docstrings_of_functions_begin_with_a_verb_or_the_noun() -> None:
    files = [path for folder in ("co3d_compile", "passes", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert not [each for path in files for each in functions_that_open_with_neither(path)]


@pytest.mark.slow
def test_the_patches_apply_and_do_what_they_say(tmp_path: Path) -> None:
    for folder in ("co3d_compile", "passes", "cli"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    patches = PATCH.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for patch in patches:
        command = ["git", "apply", "-C1", "-"]
        done = subprocess.run(command, input=patch, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{done.stderr}\n{patch}"
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(patches)


def test_the_picture_of_the_packages_is_as_the_imports_are() -> None:
    pytest.importorskip("grimp")
    command = [sys.executable, str(ROOT / "docs" / "draw_architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
