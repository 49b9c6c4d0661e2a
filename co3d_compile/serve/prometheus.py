"""The metrics of the shards as the text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from co3d_compile.serve.stream import Reply

Sample: TypeAlias = tuple[Reply, dict[str, str], float]
"""A shard, further labels, the value."""
GAUGES = {
    "streams": "Streams that the shard holds.",
    "max_streams": "Streams that it may hold.",
    "waiting": "Frames that wait.",
}
QUANTILES = {
    "latency_ms": "Milliseconds from a frame's arrival at the shard to its answer, of the newest 4096.",
    "run_ms": "Milliseconds of one run of the model, of the newest 4096.",
    "batch_fill": "Streams in one run, of the newest 4096.",
}


def prometheus_text(shards: Sequence[Reply]) -> str:
    """Writes one sample a line, of what each shard says; a shard that does not answer is ``co3d_up 0``."""
    lines = _metric(
        "co3d_up", "gauge", "Whether the shard answers.", [(s, {}, int(bool(s["healthy"]))) for s in shards]
    )
    for name, text in GAUGES.items():
        lines += _metric(f"co3d_{name}", "gauge", text, [(s, {}, s[name]) for s in shards if name in s])
    for name, key, text in (
        ("co3d_events_total", "counts", "Frames, answers, restarts, snapshots and the like."),
        ("co3d_refused_total", "refused", "Frames that were not taken, by code."),
    ):
        label = "what" if key == "counts" else "code"
        samples = [(s, {label: what}, number) for s in shards for what, number in s.get(key, {}).items()]
        lines += _metric(name, "counter", text, samples)
    for name, text in QUANTILES.items():
        found = [(s, {"quantile": f"0.{q[1:]}"}, value) for s in shards for q, value in s.get(name, {}).items()
                 if q.startswith("p") and value is not None]  # fmt: skip
        lines += _metric(f"co3d_{name}", "gauge", text, found)
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for shard, labels, value in samples:
        pairs = {"shard": str(shard["shard"]), **labels}
        inner = ",".join(f'{key}="{_escaped(each)}"' for key, each in pairs.items())
        lines.append(f"{name}{{{inner}}} {value}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
