"""Archives that come from elsewhere: nothing runs that the user did not ask for, and sizes are bounded."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import FACTORY, SHAPE, rewrite, save_export, save_script, tiny, use_folder, write

import co3d_compile as co3d
from co3d_compile.capture.load_model import load
from co3d_compile.capture.model_files import archive_safety as archive
from co3d_compile.errors import LoadError

PAYLOADS = (
    "sample inputs", "pickled weight", "legacy weights", "object", "expression", "two members of one name", "library",
)  # fmt: skip


class Payload:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def with_payload(kind: str, trace: Path) -> str:
    """A torch.export archive that runs code when torch.export.load opens it."""
    payload = io.BytesIO()
    torch.save({"a": Payload(trace)}, payload)
    path = save_export()

    def config(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
        def apply(old: bytes) -> bytes:
            content = json.loads(old)
            change(content["config"])
            return json.dumps(content).encode()

        return apply

    def as_pickled(weights: dict[str, Any]) -> None:
        weights["0.weight"]["use_pickle"] = True

    def with_object(constants: dict[str, Any]) -> None:
        constants["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    if kind == "sample inputs":
        return rewrite(path, {"sample_inputs/model.pt": lambda _: payload.getvalue()})
    if kind == "pickled weight":
        return rewrite(
            path,
            {"model_weights_config.json": config(as_pickled), "weights/weight_0": lambda _: payload.getvalue()},
        )
    if kind == "legacy weights":
        return rewrite(path, {}, {"data/weights/model.pt": payload.getvalue()})
    if kind == "object":
        return rewrite(
            path,
            {"model_constants_config.json": config(with_object)},
            {"data/constants/opaque_obj_0": pickle.dumps(Payload(trace))},
        )
    if kind == "expression":
        code = f"__import__('pathlib').Path('{trace}').touch()"
        size = b'{"as_expr": {"expr_str": "%s"}}' % code.encode()
        return rewrite(path, {"model.json": lambda old: old.replace(b'{"as_int": 4}', size)})
    if kind == "two members of one name":
        return rewrite(path, {}, {"data/sample_inputs/MODEL.pt": payload.getvalue()})
    assert kind == "library"
    return rewrite(path, {}, {"data/aotinductor/model/model.so": b"\x7fELF"})


@pytest.mark.parametrize("kind", PAYLOADS)
def test_an_archive_runs_no_code(kind: str, here: Path) -> None:
    trace = here / "trace"
    path = with_payload(kind, trace)
    with pytest.raises(LoadError, match="could run any code"):
        load(path)
    assert not trace.exists()


def test_the_payload_would_run() -> None:
    """The archives above are dangerous: opened as torch.export.load does, they run their code."""
    trace = Path("trace").absolute()
    path = with_payload("sample inputs", trace)
    with open(path, "rb") as file, contextlib.suppress(Exception):
        torch.export.load(file)
    assert trace.exists()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Symbol('s16', positive=True, integer=True)", True),
        ("Mul(Integer(192), Symbol('s16', positive=True, integer=True))", True),
        ("2*s0 + 1", True),
        ("Max(1, Mod(s0, 2))", True),
        ("__import__('os').system('true')", False),
        ("exec(chr(112))", False),
        ("S('exec(1)')", False),
        ("Symbol('__import__(1)')", False),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ("(" * 500, False),
        ("", False),
    ],
)
def test_plain_expressions(text: str, plain: bool) -> None:
    assert archive.is_plain_expression(text) is plain


def test_an_archive_with_a_dynamic_batch_loads() -> None:
    clip = torch.randn(2, 3, 4, 8, 8)
    program = torch.export.export(tiny(), (clip,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    assert tuple(load(write(buffer.getvalue())).example_inputs[0].shape) == (2, 3, 4, 8, 8)


class Pictures(torch.nn.Module):
    """Takes bytes: the conversion leaves a check of the type in the program, which returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return self.body(clip.float() / 255).mean((2, 3, 4))


def test_an_archive_with_checks_of_types_compiles() -> None:
    network, clip = Pictures().eval(), torch.randint(0, 255, (1, 3, 6, 8, 8), dtype=torch.uint8)
    torch.export.save(torch.export.export(network, (clip,)), "pictures.pt2")
    program = torch.export.load("pictures.pt2")
    assert co3d.verify(co3d.compile(program), network, (clip,)).passed


@pytest.mark.parametrize("make", [save_export, save_script])
def test_a_flipped_bit_is_seen(make: Callable[[], str]) -> None:
    path = Path(make())
    content = path.read_bytes()
    for place in range(200, len(content) // 2, len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with contextlib.suppress(LoadError):  # between members there is padding that nobody reads
            loaded = load(str(path), shapes=[SHAPE])
            program = loaded.program
            weights = program.state_dict() if isinstance(program, torch.nn.Module) else program.state_dict
            assert all(torch.equal(weights[k], v) for k, v in tiny().state_dict().items())


def test_a_zip_bomb_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "ALWAYS_ALLOWED", 1 << 20)
    with zipfile.ZipFile("m.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/archive_format", "pt2")
        file.writestr("m/models/model.json", b" " * (32 << 20))
    with pytest.raises(LoadError, match="claims to hold"):
        load("m.bin")


def test_weights_that_are_a_zip_bomb_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "ALWAYS_ALLOWED", 1 << 20)
    torch.save({"0.weight": torch.zeros(8 << 20)}, "large.pt")
    with zipfile.ZipFile("large.pt") as large, zipfile.ZipFile("w.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name in large.namelist():
            file.writestr(name, large.read(name))
    with pytest.raises(LoadError, match="claims to hold"):
        load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.pt"))


def rewritten(end: str, change: Callable[[Any], None]) -> str:
    """An archive with one of its JSON members changed."""

    def apply(old: bytes) -> bytes:
        content = json.loads(old)
        change(content)
        return json.dumps(content).encode()

    return rewrite(save_export(), {end: apply})


def meta(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["config"]["0.weight"]["tensor_meta"]
    return found


def expanded_input() -> str:
    """An example of 4 TB that is one number, repeated."""
    payload = io.BytesIO()
    torch.save(((torch.zeros(1).expand(1, 3, 10**4, 10**4, 10**4),), {}), payload)
    return rewrite(save_export(), {"sample_inputs/model.pt": lambda _: payload.getvalue()})


def outside(name: str) -> str:
    """An archive with a member of this name beside its own."""
    path = save_export()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, b"x")
    return path


FALSE: dict[str, tuple[Callable[[], str], str]] = {
    "a member above the folder": (lambda: outside("../evil"), "not in a subdirectory"),
    "a member with an absolute name": (lambda: outside("/evil"), "truncated or damaged"),
    "weights in another file": (
        lambda: rewritten(
            "model_weights_config.json",
            lambda content: content["config"]["0.weight"].update(path_name="../../../../../etc/passwd"),
        ),
        "cannot be opened",
    ),
    "a huge weight": (
        lambda: rewritten(
            "model_weights_config.json",
            lambda content: meta(content).update(
                sizes=[{"as_int": n} for n in (10**6, 10**6, 3, 3, 3)], strides=[{"as_int": 0}] * 5
            ),
        ),
        "0.weight claims a shape of 1000000x1000000x3x3x3 and holds 1296 bytes",
    ),
    "a weight beyond its storage": (
        lambda: rewritten(
            "model_weights_config.json", lambda content: meta(content).update(storage_offset={"as_int": 10**6})
        ),
        "cannot be opened",
    ),
    "a weight of strings": (
        lambda: rewritten("model_weights_config.json", lambda content: meta(content).update(sizes="large")),
        "cannot be opened",
    ),
    "a huge example": (expanded_input, "input 0 claims a shape of 1x3x10000x10000x10000 and holds 4 bytes"),
    "a number for a list of names": (
        lambda: rewritten(
            "models/model.json",
            lambda content: content["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=3),
        ),
        "cannot be opened",
    ),
    "a number for a list of guards": (
        lambda: rewritten("models/model.json", lambda content: content.update(guards_code=3)),
        "cannot be opened",
    ),
    "no graph": (lambda: rewritten("models/model.json", lambda content: content.clear()), "cannot be opened"),
}


@pytest.mark.parametrize("make, message", FALSE.values(), ids=FALSE)
def test_archives_that_say_what_is_not_so(make: Callable[[], str], message: str, here: Path) -> None:
    path = make()
    before = sorted(here.rglob("*"))
    with pytest.raises(LoadError, match=message):
        load(path)
    assert sorted(here.rglob("*")) == before and not Path("/evil").exists()
