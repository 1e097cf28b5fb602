"""Nearby attention: the one operator that the whole system is built around."""

from megatron_nuwa.ops.nearby import Backend, nearby_attention
from megatron_nuwa.ops.step import RingCache, nearby_attention_step

__all__ = ["Backend", "RingCache", "nearby_attention", "nearby_attention_step"]
