"""What a model file is, told by its content, and whether it is safe to open: files come from elsewhere."""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from co3d_compile.errors import LoadError, first_line

EXPORT = "torch.export archive"
SCRIPT = "TorchScript file"
PICKLE = "pickled module"
ONNX = "ONNX clip model"

# A zip may claim any size for its members: PyTorch stores tensors uncompressed, so an honest archive is
# about as large as what it declares.
MAX_INFLATION = 20
ALWAYS_ALLOWED = 256 << 20

_SAVE_SAFELY = "Save the module with torch.export.save(torch.export.export(model.eval(), (clip,)), 'model.pt2')"
SAFE_WAYS = f"{_SAVE_SAFELY}, or give package.module:factory with --weights FILE."

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError)
_FOREIGN = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself.", "Run git lfs pull."),
    (b"<!DOCTYPE", "is a web page, not a model.", "The download went wrong; fetch it again."),
    (b"<html", "is a web page, not a model.", "The download went wrong; fetch it again."),
    (b"\x89HDF", "is an HDF5 file (Keras?), not a PyTorch model.", "Only PyTorch models can be compiled."),
)


def identify(path: Path) -> str:
    """Finds the kind of a model file: ``EXPORT``, ``SCRIPT``, ``PICKLE`` or ``ONNX``.

    Raises:
        LoadError: The file is none of them; says what it is instead, if it can tell.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise LoadError(f"{path} is empty.")
    refuse_foreign(path, head)
    if is_safetensors(head):
        raise not_a_module(path)
    begins = head[0] == 0x08 and head[1:2] < b"\x20"
    if begins and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x3a", b"\x42"):
        return ONNX
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return PICKLE
    if head[:2] != b"PK":
        hint = "A torch.export archive, a TorchScript file or a torch.save file is wanted."
        if path.suffix == ".py":
            hint = f"Name the function or class in it that builds the model: {path}:NAME."
        raise LoadError(f"{path} is no model that can be read.", hint=hint)
    return _identify_zip(path)


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raises LoadError for a file that begins with ``head`` as what often stands in a model's place does."""
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise LoadError(f"{path} {what}", hint=hint)


def check_inflation(path: Path) -> None:
    """Refuses an archive that would grow without measure; what is no archive passes.

    Raises:
        LoadError: It claims to hold far more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(info.file_size for info in archive.infolist())
    except _BROKEN:
        return
    size = path.stat().st_size
    if declared > max(ALWAYS_ALLOWED, MAX_INFLATION * size):
        raise LoadError(f"{path} claims to hold {declared / 1e9:.1f} GB in a file of {size / 1e6:.1f} MB.")


def _identify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.split("/", 1)[-1] for name in archive.namelist()}
    except _BROKEN as error:
        raise damaged(path, "the end of the archive is missing or damaged") from error
    check_inflation(path)
    if "serialized_exported_program.json" in members:
        raise LoadError(
            f"{path} is a torch.export archive in the format of PyTorch 2.7 or older.",
            hint="Load it there and save it again with a newer PyTorch.",
        )
    if "archive_format" in members:
        _check_sums(path)
        return EXPORT
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        _check_sums(path)
        return SCRIPT
    if "data.pkl" in members:  # checksums are an option of torch.save
        return PICKLE
    raise LoadError(f"{path} is a zip archive that holds no PyTorch model.")


def _check_sums(path: Path) -> None:
    """Refuses what PyTorch, which does not look at checksums, would read as a wrong weight, or crash on."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except _BROKEN as error:
        raise damaged(path, error) from error
    if bad is not None:
        raise damaged(path, f"the checksum of {bad} is wrong")


def is_safetensors(head: bytes) -> bool:
    """Says whether a file that begins with ``head`` (9 bytes or more) is a safetensors file."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100 << 20


def damaged(path: Path, why: str | Exception) -> LoadError:
    """Makes the error for an archive that is cut off or damaged."""
    return LoadError(f"{path} is truncated or damaged: {why}.", hint="Copy or save the file again.")


def not_a_module(path: Path) -> LoadError:
    """Makes the error for a state dict where a module is needed."""
    return LoadError(
        f"{path} holds weights (a state dict), not a model.",
        hint=f"Give the code that builds the model: package.module:factory --weights {path}.",
    )


def check_export_archive(path: Path) -> None:
    """Refuses a torch.export archive that runs code when it is opened.

    ``torch.export.load`` unpickles what the archive marks as pickled, loads compiled libraries and evaluates
    symbolic expressions. An archive of an ordinary network needs none of that.

    Raises:
        LoadError: The archive would run code of its own.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names: list[str] = reader.get_all_records()
        # One reader treats names case by case, another does not: two names for one member could show two contents.
        if len({name.lower() for name in names}) != len(names):
            raise _runs_code(path, "has two members of one name")
        if any(name.startswith("data/aotinductor/") for name in names):
            raise _runs_code(path, "holds a compiled library (AOTInductor)")
        contents = {name: json.loads(reader.get_record(name)) for name in names if is_data(name)}
        for content in contents.values():
            for text in [
                str(value["expr_str"]) for value in json_objects(content) if value.get("expr_str") is not None
            ]:
                if not is_plain_expression(text):
                    raise _runs_code(path, f"has the expression {text[:60]!r} as a size")
        for name in pickled_members(path, names, contents):
            torch.load(io.BytesIO(reader.get_record(name)), "cpu", weights_only=True)
    except LoadError:
        raise
    except Exception as error:
        if "Weights only load failed" in str(error):
            raise _runs_code(path, "holds pickled Python objects") from error
        raise damaged(path, first_line(error)[:120]) from error


def _runs_code(path: Path, why: str) -> LoadError:
    return LoadError(
        f"{path} {why}: opening it could run any code on this machine.",
        hint=f"If you trust where it comes from, give --trust-pickle. {_SAVE_SAFELY}.",
    )


def is_data(name: str) -> bool:
    """Says whether a member of an archive is JSON that describes the program or its tensors."""
    return name.endswith(".json") and name.startswith(("data/", "models/"))


def pickled_members(path: Path, names: Iterable[str], contents: Mapping[str, Json]) -> set[str]:
    """Lists the members of an archive that are opened as pickles.

    Raises:
        LoadError: Some hold more than tensors.
    """
    pickled = {name for name in names if name.startswith("data/") and name.endswith(".pt")}
    return pickled.union(*(_pickled_payloads(path, name, content) for name, content in contents.items()))


def _pickled_payloads(path: Path, name: str, content: Json) -> set[str]:
    """Lists the members of an archive that one of its lists says are pickled."""
    if not name.endswith("_config.json"):
        return set()
    payloads = [value for value in json_objects(content) if "path_name" in value]
    if any(str(payload["path_name"]).startswith(("custom_obj", "opaque_obj")) for payload in payloads):
        raise _runs_code(path, "holds pickled Python objects")
    folder = name.rsplit("/", 1)[0]
    return {f"{folder}/{payload['path_name']}" for payload in payloads if payload["use_pickle"]}


def json_objects(content: Json) -> Iterator[dict[str, Json]]:
    """Yields all objects in JSON data, however deep."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.unaryop, ast.BinOp,
    ast.operator, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.Tuple,
)  # fmt: skip


def is_plain_expression(text: str) -> bool:
    """Says whether a size expression such as ``Mul(Integer(64), Symbol('s16', positive=True))`` is only arithmetic."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _EXPRESSION_NODES) and _is_plain(node) for node in nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        # `S` is sympy's own evaluator of strings.
        return isinstance(node.func, ast.Name) and node.func.id[:1].isupper() and node.func.id != "S"
    if isinstance(node, ast.Name):
        return bool(re.fullmatch(r"[A-Z]\w*|[a-z]+\d+|(int_)?oo", node.id))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(re.fullmatch(r"[a-z]+\d+", node.value))
    return True
