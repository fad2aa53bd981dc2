"""Batch jobs on Ray: a file of prompts in, a folder of answers out; killed and resumed, none is lost or done twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.serve.batch.job import Cluster as Cluster
    from quickmerge.serve.batch.job import run_job as run_job
    from quickmerge.serve.batch.rows import Columns as Columns
    from quickmerge.serve.batch.rows import Row as Row
    from quickmerge.serve.batch.rows import read_rows as read_rows
    from quickmerge.serve.batch.store import Store as Store
    from quickmerge.serve.batch.writer import Writer as Writer
    from quickmerge.serve.batch.writer import WriterSettings as WriterSettings

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "job": ("Cluster", "run_job"),
        "rows": ("Columns", "Row", "read_rows"),
        "store": ("Store",),
        "writer": ("Writer", "WriterSettings"),
    },
)
