"""``co3d doctor``: what is installed, what is missing for what, and whether a tiny model compiles and streams."""

from __future__ import annotations

import importlib
import os
import platform
import textwrap
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Group
from rich.text import Text

from co3d_compile.cli.common import Command, Report, join, json_option, print_json, stdout, verbose_option
from co3d_compile.cli.features import FEATURES
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import console_for, facts_table, rows_table, show
from co3d_compile.errors import VerificationError
from co3d_compile.support.install_hint import install_command
from co3d_compile.version import __version__

FRAMES = 10
TOLERANCE = 1e-4


@click.command(cls=Command, name="doctor")
@json_option
@verbose_option
def command(as_json: bool, verbose: int) -> None:
    """Check this installation.

    Shows versions, providers, threads and what is missing for which feature, and streams ten frames as a self-test.

    \b
    Examples:
      co3d doctor
      co3d doctor --json | jq .providers

    \b
    Exit codes:
      0    the self-test passed, or what it needs is missing
      3    the self-test failed
    """
    with Progress(verbose) as progress:
        progress("self-test")
        report = examine()
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["self_test"]["passed"] is False:
        raise VerificationError(f"The self-test failed: {report['self_test']['result']}.")


def examine() -> Report:
    """Collects all findings in one dict."""
    features = []
    distributions = metadata.packages_distributions()
    for name, packages, install in FEATURES:
        versions = {package: _version(package, distributions.get(package)) for package in packages}
        missing = [package for package, found in versions.items() if found is None]
        features.append({"feature": name, "packages": versions, "missing": missing, "install": install})
    report: Report = {
        "co3d_compile": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _cores(),
        "providers": _providers(),
        "features": features,
    }
    needed = [package for feature in features[:2] for package in feature["missing"]]
    report["self_test"] = {"passed": None, "result": f"it needs {join(needed)}"} if needed else _tested(report)
    return report


def _cores() -> int:
    """Counts the processors that this process may use, as far as the system says it."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _tested(report: Report) -> Report:
    """Runs the self-test; a package that is there and broken is a finding too."""
    try:
        return _self_test(report)
    except Exception as error:
        return {"passed": False, "result": f"{type(error).__name__}: {error}"[:300]}


def _version(package: str, distributions: list[str] | None) -> str | None:
    """Reads the version of what can be imported; a package that is there and does not import counts as missing."""
    try:
        importlib.import_module(package)
    except Exception:
        return None
    return metadata.version(distributions[0]) if distributions else None


def _providers() -> list[str]:
    try:
        ort = importlib.import_module("onnxruntime")
    except (ImportError, OSError):  # OSError: a library of it is missing
        return []
    ort.set_default_logger_severity(3)
    return list(ort.get_available_providers())


def _self_test(report: Report) -> Report:
    """Compiles two convolutions and streams ten frames beside the clip model."""
    import numpy as np
    import torch
    from torch import nn

    import co3d_compile as co3d

    report["threads"] = torch.get_num_threads()
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, (3, 1, 1))).eval()
    clip = torch.randn(1, 3, FRAMES, 8, 8)
    torch.random.set_rng_state(torch_state)
    with torch.no_grad():
        expected = model(clip).numpy()
    with TemporaryDirectory() as folder:
        file = Path(folder, "self_test.onnx")
        co3d.compile(model, (clip,)).save(file)
        session = co3d.StreamSession(file)
        results = [session.step(clip[:, :, t].numpy()) for t in range(FRAMES)]
    # Results before the warm-up read frames from before the start; what follows is in step with the clip's interior.
    # The first convolution is padded by one on each side, so the clip's first and last entries read zeros.
    delay, inside = session.info.outputs[0].delay, slice(1, expected.shape[2] - 1)
    streamed = np.stack(results[delay:], axis=2)[:, :, inside]
    error = float(np.abs(streamed - expected[:, :, inside][:, :, : streamed.shape[2]]).max() / expected.std())
    passed = error <= TOLERANCE and streamed.shape[2] > 0
    return {"passed": passed, "result": f"{FRAMES} frames, relative error {error:.1e}"}


def _print(report: Report) -> None:
    test = report["self_test"]
    words = {True: ("passed", "green"), False: ("FAILED", "bold red"), None: ("not run", "yellow")}
    facts = facts_table(
        ("co3d-compile", report["co3d_compile"]),
        ("Python", f"{report['python']} on {report['platform']}"),
        ("Cores", f"{report['cores']}" + (f", torch uses {report['threads']}" if "threads" in report else "")),
        ("ONNX Runtime providers", join(report["providers"]) or "none"),
        ("Self-test", Text.assemble(words[test["passed"]], f", {test['result']}")),
    )
    table = rows_table("What this installation can do", "to", "found", "missing")
    for feature in report["features"]:
        found = join([f"{name} {number}" for name, number in feature["packages"].items() if number])
        table.add_row(feature["feature"], found, join(feature["missing"]))
    lacking = [feature for feature in report["features"] if feature["missing"]]
    ways: dict[str, list[str]] = {}
    for feature in lacking:
        ways.setdefault(feature["install"], []).append(feature["feature"])
    how = [_way(console_for(stdout()).width, install_command(what), join(names)) for what, names in ways.items()]
    show(stdout(), facts, table, Group(Text("To get what is missing", "bold"), *how) if how else None)


def _way(width: int, command: str, what: str) -> Text:
    """Writes a command below what it is for: each line of that is a comment, for who copies all."""
    comment = textwrap.fill(what, width, initial_indent="# ", subsequent_indent="# ", break_long_words=False)
    return Text.assemble((comment, "dim"), "\n", command, overflow="fold")
