"""Quality beside cost, measured in one run."""

from quickmerge.evaluation.bench import bench
from quickmerge.evaluation.cost import Shape, model_shape, plan_cost
from quickmerge.evaluation.documents import Document, split_document
from quickmerge.evaluation.linearity import functional_linearity, suggested_switch
from quickmerge.evaluation.perplexity import perplexity
from quickmerge.evaluation.recovery import Recovery, bootstrap, recovery

__all__ = [
    "Document",
    "Recovery",
    "Shape",
    "bench",
    "bootstrap",
    "functional_linearity",
    "model_shape",
    "perplexity",
    "plan_cost",
    "recovery",
    "split_document",
    "suggested_switch",
]
