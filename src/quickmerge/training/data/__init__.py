"""Readers of training data: texts, images, videos, and Hugging Face datasets on disk."""

from quickmerge.training.data.find import Data, find_data
from quickmerge.training.data.held_out import Passages, overlap
from quickmerge.training.data.hub import Column, from_disk
from quickmerge.training.data.images import ImageFolder
from quickmerge.training.data.text import TextWindows
from quickmerge.training.data.video import VideoClips

__all__ = [
    "Column",
    "Data",
    "ImageFolder",
    "Passages",
    "TextWindows",
    "VideoClips",
    "find_data",
    "from_disk",
    "overlap",
]
