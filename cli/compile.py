"""``co3d-compile MODEL -o OUT.onnx``: load, compile, verify, write."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from co3d_compile.cli.common import (
    EXIT_CODES,
    FILE,
    FOLDER,
    OUTPUT,
    Command,
    Options,
    Report,
    json_option,
    option,
    print_json,
    stdout,
    verbose_option,
    version_option,
)
from co3d_compile.cli.model_options import load_model, model_options
from co3d_compile.cli.output_file import Output, keep_apart, page_output, size
from co3d_compile.cli.picture_options import picture_options, take_pictures
from co3d_compile.cli.precision_options import precision_options, take_precision
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import print_summary, reason
from co3d_compile.cli.time_options import take_time, time_options
from co3d_compile.errors import OutputError, UsageError, VerificationError

if TYPE_CHECKING:
    from co3d_compile.capture.load_model import Loaded
    from co3d_compile.verification.verification import Verification

EPILOG = f"""\b
Examples:
  A torch.export archive, which knows its clip shape:
    co3d-compile model.pt2 -o model.onnx
  A TorchScript file:
    co3d-compile model.ts -o model.onnx --shape 1x3x16x224x224
  A model from code, with its weights:
    co3d-compile pytorchvideo.models.hub:x3d_s -o x3d_s.onnx \\
        --kwargs '{{"pretrained": false}}' --weights X3D_S.pyth \\
        --shape 1x3x13x160x160
  The step as a torch.export program, for AOTInductor or ExecuTorch:
    co3d-compile model.pt2 -o step.pt2
  Trained on 16 frames, run with a memory of 64:
    co3d-compile model.pt2 -o model.onnx --window 64
  Answers at most half a second late, at the price of another network:
    co3d-compile model.pt2 -o model.onnx --max-delay 0.5s --fps 10
  With all that co3d run needs to know:
    co3d-compile model.pt2 -o model.onnx --size 182 --mean 0.45 --std 0.225 \\
        --labels names.txt

{EXIT_CODES}"""


@click.command(cls=Command, name="co3d-compile", epilog=EPILOG, context_settings={"max_content_width": 100})
@click.argument("model")
@option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    group=OUTPUT,
    metavar="OUT.onnx",
    help="The file to write; OUT.pt2: as a torch.export program. It appears whole, once verified, or not at all.",
)
@model_options
@time_options
@option(
    "--state-io",
    type=click.Choice(["paired", "renamed"]),
    default="paired",
    show_default=True,
    group=OUTPUT,
    help="renamed: states that only move by a slot are not copied.",
)
@option(
    "--also",
    multiple=True,
    group=OUTPUT,
    metavar="MODULE",
    help="Give the result of this part of the network too, such as blocks.4; may be repeated. co3d run --features "
    "writes it.",
)
@precision_options
@option(
    "--native",
    is_flag=True,
    group=OUTPUT,
    help="For machines like this one alone, and faster: states in the layout of its kernels, and renamed.",
)
@option(
    "--tune",
    is_flag=True,
    group=OUTPUT,
    help="Measure here which form of each convolution is fastest; kept for the next time. Nothing else should run.",
)
@option(
    "--no-verify", is_flag=True, group=OUTPUT, help="Do not run the compiled file in ONNX Runtime beside the original."
)
@picture_options
@option("--keep", is_flag=True, group=OUTPUT, help="Keep the file even if verification fails.")
@json_option
@option(
    "--dump",
    type=FOLDER,
    group=OUTPUT,
    metavar="DIR",
    help="Write the graph before and after each pass to DIR, as text. It stays there, whatever happens.",
)
@option(
    "--report",
    type=FILE,
    group=OUTPUT,
    metavar="OUT.html",
    help="Write what was done as one page for a browser, which works offline. co3d inspect --html does it later.",
)
@verbose_option
@version_option
def main(model: str, output: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Compile a trained clip-based video network into an ONNX model that takes the next frame and its own state.

    MODEL is a torch.export archive (.pt2), a TorchScript file, a pickled module (only with --trust-pickle), an ONNX
    clip model, package.module:factory or folder/file.py:factory. What a file is, is found from its content. The current
    directory is importable.
    """
    report = run(model, output, verbose, options)
    if as_json:
        print_json(report)
    else:
        print_summary(report, stdout(), verbose)
    result = report["verification"]
    if result is not None and not result["passed"]:
        raise VerificationError(
            f"The compiled model differs from {model}: {reason(result)}",
            hint=f"{output} was kept as told." if report["output"] else f"{output} was not written; --keep would.",
        )


def run(model: str, path: Path, verbose: int, options: Options) -> Report:
    """Does the work; returns the report. A file that fails verification is put in place only with ``keep``."""
    keep_apart([path, options["report"]], model=model, weights=options["weights"], labels=options["labels"])
    output = Output(path)
    _check_dump(options["dump"])
    keep, no_verify, native = options.pop("keep"), options.pop("no_verify"), options.pop("native")
    if native and path.suffix == ".pt2":
        raise UsageError("--native is about ONNX Runtime, and a .pt2 is not for it.", hint="Give -o OUT.onnx.")
    reduce = take_precision(options, native, path)
    options["state_io"] = "renamed" if native else options["state_io"]
    preprocess, labels = take_pictures(options)
    page = page_output(options.pop("report"))
    with Progress(verbose) as progress:
        progress("load")
        loaded = load_model(model, options)
        compiled = _compile(loaded, options, progress, (preprocess or {}).get("fps"))
        if native:
            progress("native")
            compiled = compiled.to_native()
        if preprocess or labels:
            compiled.describe(preprocess, labels)
        if reduce is not None:
            if not no_verify:  # exact it must be before, as an error of the compiler would hide in what is lost
                _exact(compiled, loaded, progress)
            progress("reduce")
            compiled = reduce(compiled)
        with output.writing() as file:
            write = _write_step if path.suffix == ".pt2" else _write
            result = write(file, compiled, None if no_verify else loaded, progress)
            file_bytes = size(file)
            written = result is None or result["passed"] or keep
            if not written:
                file.unlink()
        if page is not None:
            with page.writing() as file:
                file.write_text(compiled.to_html(result), encoding="utf-8")
    report: Report = compiled.report().to_dict()
    ours = {stage: spent for stage, spent in progress.seconds.items() if stage in ("load", "write", "verify")}
    return {
        **report,
        "fps": (preprocess or {}).get("fps"),
        "source": {"model": model, "kind": loaded.kind, "notes": loaded.notes},
        "verification": result,
        "output": str(path) if written else None,
        "file_bytes": file_bytes,
        "seconds": {**report["seconds"], **ours},
    }


def _compile(loaded: Loaded, options: Options, progress: Progress, fps: float | None) -> Any:
    import co3d_compile as co3d

    how = take_time(options, fps)
    return co3d.compile(loaded.program, loaded.example_inputs, progress=progress, **how, **options)


def _write(file: Path, compiled: Any, loaded: Loaded | None, progress: Progress) -> Report | None:
    """Writes the ONNX file, and verifies it unless there is nothing to compare with."""
    progress("write")
    compiled.save(file)
    if loaded is None:
        return None
    result: Report = _verify(file, loaded, progress).to_dict()
    return result


def _write_step(file: Path, compiled: Any, loaded: Loaded | None, progress: Progress) -> Report | None:
    """Writes the torch.export archive. Verified is the ONNX file of the same step, and that both agree."""
    progress("write")
    compiled.save_exported_program(file)
    if loaded is None:
        return None
    from co3d_compile.verification.exported_step import verify_step

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.onnx")
        compiled.save(model)
        result: Report = verify_step(file, model, _verify(model, loaded, progress)).to_dict()
    return result


def _exact(compiled: Any, loaded: Loaded, progress: Progress) -> None:
    """Verifies the model in full precision. Raises VerificationError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        compiled.save(file)
        result = _verify(file, loaded, progress).to_dict()
    if not result["passed"]:
        raise VerificationError(f"The compiled model differs before its precision is reduced: {reason(result)}")


def _verify(file: Path, loaded: Loaded, progress: Progress) -> Verification:
    from co3d_compile.verification.verify_model import verify

    progress("verify")

    def forward(_: str, done: int, total: int) -> None:
        progress("verify", done, total)

    return verify(file, loaded.program, loaded.example_inputs, progress=forward)


def _check_dump(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        probe = folder / f".{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--dump {folder} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    main()
