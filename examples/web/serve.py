"""Serves the page on this machine: python examples/web/serve.py MODEL.onnx, then open the address that it prints.

A browser gives a page threads only with two headers, and the camera only on this machine or over HTTPS.
"""

from __future__ import annotations

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1]


class Handler(SimpleHTTPRequestHandler):
    """The examples, with files of other places under their names.

    Args:
        files: By path of the address; what lies below a folder comes with it.
    """

    def __init__(self, *arguments: Any, files: dict[str, Path]) -> None:
        self.files = files
        super().__init__(*arguments, directory=str(EXAMPLES))

    def translate_path(self, path: str) -> str:
        inside = Path(super().translate_path(path)).relative_to(EXAMPLES)
        for name, target in self.files.items():
            if inside.is_relative_to(name):
                return str(target / inside.relative_to(name)) if inside != Path(name) else str(target)
        return str(EXAMPLES / inside)

    def guess_type(self, path: Any) -> str:
        types = {".mjs": "text/javascript", ".wasm": "application/wasm"}  # browsers insist, and not every Python knows
        return types.get(Path(path).suffix) or super().guess_type(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clip", type=Path, help="the clip model as ONNX, to compare with")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    files = {"web/model.onnx": arguments.model.resolve()}
    if arguments.clip:
        files["web/clip.onnx"] = arguments.clip.resolve()
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), partial(Handler, files=files)) as server:
        query = "?clip=clip.onnx" if arguments.clip else ""
        print(f"http://localhost:{server.server_port}/web/index.html{query}")
        server.serve_forever()


if __name__ == "__main__":
    main()
