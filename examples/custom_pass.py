"""A pass of one's own on a real network: X3D streams embeddings for similarity search instead of class scores.

The pass cuts the classifier off the captured graph and makes what goes into it the output. It needs no change to the
network's code, so it also works on a ``torch.export`` archive whose source is elsewhere.

Run: python examples/custom_pass.py
"""

from __future__ import annotations

import numpy as np
import torch
from networks import x3d_xs

import co3d_compile as co3d
from co3d_compile.passes import Output, Program, insert, module_path


class ExposeInput(co3d.Pass):
    """Makes what goes into a module the model's only output, flattened to (N, features):

    ``output(softmax(linear(x)))`` to ``output(flatten(x, 1))`` for the module of ``linear``.

    Args:
        module: Path of the module that is cut off, such as ``blocks.5.proj``.
        name: Name of the new output.
    """

    requires = frozenset({"canonical"})

    def __init__(self, module: str, name: str = "embedding") -> None:
        self.module = module
        self.output = name

    def run(self, program: Program) -> bool:
        calls = [n for n in program.graph.nodes if n.op == "call_function" and module_path(n) == self.module]
        if not calls:
            paths = sorted({module_path(n) for n in program.graph.nodes} - {""})
            raise co3d.PassError(f"The pass {self.name} finds no module {self.module!r} among {', '.join(paths)}.")
        output = next(n for n in program.graph.nodes if n.op == "output")
        feature = insert(program, output, torch.ops.aten.flatten.using_ints, calls[0].args[0], 1)
        output.args = ((feature,),)
        program.outputs[:] = [Output(self.output)]
        program.graph.eliminate_dead_code()
        return True


def main() -> None:
    """Streams embeddings and, from the unchanged pipeline, scores: the classifier must lead from one to the other."""
    torch.manual_seed(0)
    model = x3d_xs().eval()
    clip = torch.rand(1, 3, 4, 160, 160)
    passes = co3d.default_passes().after("canonicalize", ExposeInput("blocks.5.proj"))
    embeddings = co3d.StreamSession(co3d.compile(model, (clip,), passes=passes))
    scores = co3d.StreamSession(co3d.compile(model, (clip,)))

    classifier = model.get_submodule("blocks.5.proj")
    worst = 0.0
    for frame in np.random.default_rng(0).random((16, 1, 3, 160, 160), dtype=np.float32):
        embedding = np.asarray(embeddings.step(frame))
        with torch.no_grad():
            expected = torch.softmax(classifier(torch.from_numpy(embedding)), 1).numpy()
        worst = max(worst, float(np.abs(scores.step(frame) - expected).max()))
    print(f"output {next(iter(embeddings.info.delays))!r} of shape {embedding.shape}")
    print(f"largest difference of the scores computed from it: {worst:.1e}")
    if worst > 1e-6:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
