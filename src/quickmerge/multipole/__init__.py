"""Multipole attention (arXiv 2506.13059): new tokens read the keys that matter, and centroids of all others."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.multipole.cache import MultipoleCache as MultipoleCache
    from quickmerge.multipole.cache import MultipoleLayer as MultipoleLayer
    from quickmerge.multipole.clustering import bounds as bounds
    from quickmerge.multipole.clustering import cluster as cluster
    from quickmerge.multipole.clustering import extend as extend
    from quickmerge.multipole.clusters import Block as Block
    from quickmerge.multipole.clusters import Clusters as Clusters
    from quickmerge.multipole.clusters import summarise as summarise
    from quickmerge.multipole.run import MultipoleRun as MultipoleRun
    from quickmerge.multipole.run import multipole as multipole
    from quickmerge.multipole.settings import Multipole as Multipole
    from quickmerge.multipole.settings import MultipoleStats as MultipoleStats
    from quickmerge.multipole.weighted_kmeans import kmeans as kmeans

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "cache": (
            "MultipoleCache",
            "MultipoleLayer",
        ),
        "clustering": (
            "bounds",
            "cluster",
            "extend",
        ),
        "clusters": (
            "Block",
            "Clusters",
            "summarise",
        ),
        "run": (
            "MultipoleRun",
            "multipole",
        ),
        "settings": (
            "Multipole",
            "MultipoleStats",
        ),
        "weighted_kmeans": ("kmeans",),
    },
)


class _Package(ModuleType):
    """``quickmerge.multipole`` is this package and, called, the function in it: Python gives both the same name.

    Importing any module of a package puts the package itself in the place of a function of its name.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `quickmerge.multipole.multipole`."""
        return self.multipole(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
