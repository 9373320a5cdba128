"""A draft model learns its target's distributions, so that more of what it drafts is accepted (DistillSpec: Zhou et
al. 2023, arXiv:2310.08461)."""

from jaxinf.training.align.losses import Loss
from jaxinf.training.align.measure import Contexts, Match, make_contexts, measure, rejections_gone
from jaxinf.training.align.run import Probe, align
from jaxinf.training.align.training import Aligner, AlignRecord, AlignSpec, Source, check_pair

__all__ = [
    "AlignRecord",
    "AlignSpec",
    "Aligner",
    "Contexts",
    "Loss",
    "Match",
    "Probe",
    "Source",
    "align",
    "check_pair",
    "make_contexts",
    "measure",
    "rejections_gone",
]
