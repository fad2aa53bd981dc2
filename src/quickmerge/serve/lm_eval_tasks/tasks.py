"""What the YAML beside it names; all of it is in `quickmerge.serve.needles`."""

from functools import partial

from quickmerge.serve.needles import dataset, process_results

__all__ = ["keys", "number", "process_results", "queries", "uuid", "values"]

number = partial(dataset, "number")
uuid = partial(dataset, "uuid")
keys = partial(dataset, "keys")
values = partial(dataset, "values")
queries = partial(dataset, "queries")
