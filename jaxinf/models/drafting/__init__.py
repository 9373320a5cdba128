"""Heads that draft for a frozen target: their modules, and what ties them to it."""

from jaxinf.models.drafting.ahead import AheadSpec, AheadTokens
from jaxinf.models.drafting.eagle import EagleHead, EagleSpec
from jaxinf.models.drafting.fingerprint import fingerprint
from jaxinf.models.drafting.medusa import MedusaHeads, MedusaSpec
from jaxinf.models.drafting.narrowing import narrowed

__all__ = [
    "AheadSpec",
    "AheadTokens",
    "EagleHead",
    "EagleSpec",
    "MedusaHeads",
    "MedusaSpec",
    "fingerprint",
    "narrowed",
]
