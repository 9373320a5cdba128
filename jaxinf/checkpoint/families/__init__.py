"""Published families: how each is told from `config.json` and where it keeps its weights."""

from jaxinf.checkpoint.families import early, gemma, layernormed, llama, mixtures, qwen
from jaxinf.checkpoint.families.readers import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **qwen.FAMILIES,
    **mixtures.FAMILIES,
    **gemma.FAMILIES,
    **layernormed.FAMILIES,
    **early.FAMILIES,
}
"""By `model_type`."""

__all__ = ["FAMILIES", "Family"]
