"""The studio: a page to give a text or an image, and see what is kept, both answers side by side, and the cost.

What a request does (`work`) knows nothing of the page; the page (`page`) knows nothing of models. gradio is imported
when the page is made, and by no other command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.serve.studio.jobs import Job as Job
    from quickmerge.serve.studio.jobs import StoppedError as StoppedError
    from quickmerge.serve.studio.jobs import Teller as Teller
    from quickmerge.serve.studio.server import serve as serve
    from quickmerge.serve.studio.sessions import Session as Session
    from quickmerge.serve.studio.shelf import Shelf as Shelf
    from quickmerge.serve.studio.ways import Way as Way
    from quickmerge.serve.studio.ways import ways_of as ways_of
    from quickmerge.serve.studio.work import answer_text as answer_text
    from quickmerge.serve.studio.work_images import look as look
    from quickmerge.serve.studio.work_images import look_video as look_video

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "jobs": ("Job", "StoppedError", "Teller"),
        "server": ("serve",),
        "sessions": ("Session",),
        "shelf": ("Shelf",),
        "ways": ("Way", "ways_of"),
        "work": ("answer_text",),
        "work_images": ("look", "look_video"),
    },
)
