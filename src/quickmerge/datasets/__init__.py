"""Readers of training data: texts, images, videos, and Hugging Face datasets on disk."""

from quickmerge.datasets.asked import AskedWindows
from quickmerge.datasets.find import Data, find_data
from quickmerge.datasets.hub import Column, from_disk
from quickmerge.datasets.images import ImageFolder
from quickmerge.datasets.text import Passages, TextWindows, overlap
from quickmerge.datasets.video import VideoClips

__all__ = [
    "AskedWindows",
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
