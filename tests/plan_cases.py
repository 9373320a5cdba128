"""Cases that plans are made of."""

from jaxinf.aot.plan import Case
from jaxinf.layers import AttentionSpec, FFNSpec, LayerSpec, MoESpec, RopeSpec, TokenChoice
from jaxinf.models import ModelSpec, Segment, presets

TINY = ModelSpec(
    1024,
    256,
    (Segment((LayerSpec(AttentionSpec(4, 2, 64, rope=RopeSpec(64)), FFNSpec(512)),), 4),),
    2048,
)
MIXTURE = ModelSpec(
    1024,
    256,
    (Segment((LayerSpec(AttentionSpec(4, 2, 64, rope=RopeSpec(64)), MoESpec(8, 256, TokenChoice(top_k=2))),), 4),),
    2048,
)


def case(model: str | ModelSpec = TINY, **fields) -> Case:
    name, spec = (model, presets.preset(model)) if isinstance(model, str) else ("tiny", model)
    return Case(name, spec, **(dict(batch=8, context=1024, prompt=512) | fields))
