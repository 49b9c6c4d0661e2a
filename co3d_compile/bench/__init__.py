"""Times of the compiled file beside the clip model."""

from co3d_compile.bench.bench_model import bench

__all__ = ["bench"]
