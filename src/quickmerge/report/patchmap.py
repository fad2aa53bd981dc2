"""Pictures of merged patches: which parts of a photo or a video a model reads on with as one token.

:func:`group_colours` paints one picture; :func:`merged_picture` sets a photo beside copies at rising depth;
:func:`video_strip` and :func:`video_animation` follow tokens over the frames of a video. All start from a
:class:`PatchStage`, and :func:`write_picture` writes what they draw.
"""

from __future__ import annotations

from quickmerge.report.patchmap_animation import video_animation
from quickmerge.report.patchmap_files import write_picture
from quickmerge.report.patchmap_paint import Alone, group_colours
from quickmerge.report.patchmap_picture import merged_picture
from quickmerge.report.patchmap_stage import PatchStage, Picture
from quickmerge.report.patchmap_video import video_strip

__all__ = [
    "Alone",
    "PatchStage",
    "Picture",
    "group_colours",
    "merged_picture",
    "video_animation",
    "video_strip",
    "write_picture",
]
