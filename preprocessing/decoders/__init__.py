"""Media files to RGB frames: images by Pillow, clips by ffmpeg or PyAV; sketches."""

from preprocessing.decoders.clips import decode_clip
from preprocessing.decoders.facts import MediaFacts, media_facts
from preprocessing.decoders.images import decode_image
from preprocessing.decoders.kinds import (
    CLIP_SUFFIXES,
    IMAGE_SUFFIXES,
    MediaKind,
    media_kind,
)
from preprocessing.decoders.media import decode, decode_media
from preprocessing.decoders.settings import (
    Decoded,
    DecodeError,
    DecodeLimits,
    DecodeSettings,
)
from preprocessing.decoders.sketches import decode_sketch

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
    "media_facts",
    "media_kind",
]
