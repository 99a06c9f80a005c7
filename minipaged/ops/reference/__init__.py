"""The operators in NumPy, float32: the oracle for every other backend, readable first."""

from __future__ import annotations

from minipaged.ops.reference.activations import activation, gated_activation, soft_cap
from minipaged.ops.reference.attention import paged_attention, plan_attention
from minipaged.ops.reference.kv import write_kv
from minipaged.ops.reference.linear import embedding, linear
from minipaged.ops.reference.moe import moe
from minipaged.ops.reference.norms import layer_norm, rms_norm
from minipaged.ops.reference.rope import rope


class ReferenceOps:
    """:class:`~minipaged.ops.interface.Ops` in NumPy; it holds no state."""

    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    layer_norm = staticmethod(layer_norm)
    linear = staticmethod(linear)
    rope = staticmethod(rope)
    write_kv = staticmethod(write_kv)
    plan_attention = staticmethod(plan_attention)
    paged_attention = staticmethod(paged_attention)
    activation = staticmethod(activation)
    gated_activation = staticmethod(gated_activation)
    soft_cap = staticmethod(soft_cap)
    moe = staticmethod(moe)
