"""Media files to RGB frames: images by Pillow, clips by ffmpeg or PyAV; sketches."""

from megatron_nuwa.decoders.clips import decode_clip
from megatron_nuwa.decoders.facts import MediaFacts, media_facts
from megatron_nuwa.decoders.images import decode_image, fitted_image
from megatron_nuwa.decoders.kinds import (
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    MediaKind,
    media_kind,
)
from megatron_nuwa.decoders.media import decode, decode_media
from megatron_nuwa.decoders.settings import (
    Decoded,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)
from megatron_nuwa.decoders.sketches import decode_sketch, sketch_size

__all__ = [
    "CLIP_SUFFIXES",
    "IMAGE_SUFFIXES",
    "DecodeError",
    "DecodeLimits",
    "DecodeSettings",
    "Decoded",
    "MediaFacts",
    "MediaKind",
    "decode",
    "decode_clip",
    "decode_image",
    "decode_media",
    "decode_sketch",
    "fitted_image",
    "media_facts",
    "media_kind",
    "sketch_size",
]
