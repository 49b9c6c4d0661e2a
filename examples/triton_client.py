"""Streams frames to a compiled model behind Triton Inference Server: one sequence per stream, the state stays there.

    pip install "tritonclient[grpc]"
    python examples/triton_client.py MODEL FRAMES.npy [--url localhost:8001]

FRAMES.npy is an array (steps, …): what each step takes, without the batch. Prints the top class of each step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tritonclient import grpc


def stream(client: Any, model: str, frames: Iterable[Any], sequence: int) -> Iterator[Any]:
    """Sends the frames of one stream and yields a dict of results per step, from the first that is right on.

    Args:
        client: A ``tritonclient.grpc.InferenceServerClient``.
        model: The model's name in the repository.
        frames: What each step takes, without the batch.
        sequence: The correlation id: a whole number above 0 that no other stream has at the same time.
    """
    config = client.get_model_config(model).config
    warmup = int(config.parameters["co3d.warmup_steps"].string_value)
    name, dtype = config.input[0].name, grpc.model_config_pb2.DataType.Name(config.input[0].data_type)
    ahead = itertools.chain(frames, [None])
    frame, step = next(ahead), 0
    while frame is not None:
        following = next(ahead)
        value = grpc.InferInput(name, [1, *frame.shape], dtype.removeprefix("TYPE_"))
        value.set_data_from_numpy(np.ascontiguousarray(frame[None]))
        result = client.infer(
            model, [value], sequence_id=sequence, sequence_start=step == 0, sequence_end=following is None
        )
        if step >= warmup:
            yield {output.name: result.as_numpy(output.name)[0] for output in config.output}
        frame, step = following, step + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("frames")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--sequence", type=int, default=1)
    arguments = parser.parse_args()
    with grpc.InferenceServerClient(arguments.url) as client:
        for results in stream(client, arguments.model, np.load(arguments.frames), arguments.sequence):
            print({name: int(value.argmax()) for name, value in results.items()})


if __name__ == "__main__":
    main()
