"""Where media and captions come from: manifests, webdataset tars, folders; local or remote."""

from preprocessing.sources.items import Source, SourceItem, TarMember, media_name
from preprocessing.sources.media import (
    decode_copy,
    decode_item,
    decode_item_sketch,
    local_copy,
    named_as_source,
)
from preprocessing.sources.opening import read_manifest, read_source

__all__ = [
    "Source",
    "SourceItem",
    "TarMember",
    "decode_copy",
    "decode_item",
    "decode_item_sketch",
    "local_copy",
    "media_name",
    "named_as_source",
    "read_manifest",
    "read_source",
]
