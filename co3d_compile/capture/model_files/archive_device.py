"""A torch.export archive that was written on a GPU, read for the CPU."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import IO

import torch

from co3d_compile.capture.model_files.archive_safety import Json, is_data, json_objects, pickled_members

HERE = ("cpu", "meta")


def opened_for_the_cpu(path: Path, trust_pickle: bool) -> tuple[IO[bytes], str | None]:
    """Opens an archive to be loaded, and says which device it was written on if that is another one.

    The program names a device for each of its tensors, and so do its weights and the clip that it was exported with.
    What was looked at for safety is read by the same reader and written anew, with the CPU in these places.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    names: list[str] = reader.get_all_records()
    contents: dict[str, Json] = {name: json.loads(reader.get_record(name)) for name in names if is_data(name)}
    found = {str(d["type"]) for content in contents.values() for d in json_objects(content) if _is_elsewhere(d)}
    if not found:
        return path.open("rb"), None
    members = {name: reader.get_record(name) for name in names if not name.startswith(".data/") and name != "byteorder"}
    for name, content in contents.items():
        for device in filter(_is_elsewhere, json_objects(content)):
            device |= {"type": "cpu", "index": None}
        members[name] = json.dumps(content).encode()
    for name in pickled_members(path, names, contents):
        moved = io.BytesIO()
        torch.save(torch.load(io.BytesIO(members[name]), "cpu", weights_only=not trust_pickle), moved)
        members[name] = moved.getvalue()
    archive = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(archive)
    for name, value in members.items():
        writer.write_record(name, value, len(value))
    writer.write_end_of_file()
    archive.seek(0)
    return archive, ", ".join(sorted(found))


def _is_elsewhere(value: dict[str, Json]) -> bool:
    """Says whether an object of the JSON is a device, and none that is everywhere."""
    return value.keys() == {"type", "index"} and isinstance(value["type"], str) and value["type"] not in HERE
