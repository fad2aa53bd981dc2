"""Multipole attention (arXiv 2506.13059): new tokens read the keys that matter, and centroids of all others."""

from quickmerge.attention.cache import MultipoleCache, MultipoleLayer
from quickmerge.attention.clustering import bounds, cluster, extend
from quickmerge.attention.clusters import Block, Clusters, summarise
from quickmerge.attention.kmeans import kmeans
from quickmerge.attention.run import MultipoleRun, multipole
from quickmerge.attention.settings import Multipole
from quickmerge.attention.summary import MultipoleStats

__all__ = [
    "Block",
    "Clusters",
    "Multipole",
    "MultipoleCache",
    "MultipoleLayer",
    "MultipoleRun",
    "MultipoleStats",
    "bounds",
    "cluster",
    "extend",
    "kmeans",
    "multipole",
    "summarise",
]
