"""Nearby attention: the one operator that the whole system is built around."""

from megatron_nuwa.ops.nearby import Backend, nearby_attention

__all__ = ["Backend", "nearby_attention"]
