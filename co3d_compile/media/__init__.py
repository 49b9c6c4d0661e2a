"""Video in, predictions out."""

from co3d_compile.media.annotated_video import AnnotatedVideo
from co3d_compile.media.video import VideoFrame, read_frames, write_video

__all__ = ["AnnotatedVideo", "VideoFrame", "read_frames", "write_video"]
