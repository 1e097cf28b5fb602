"""What `tokenize` is asked for, and the settings of the corpus that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_nuwa.config import Settings, load_settings
from megatron_nuwa.data.shard_list import MOST_SHARDS
from megatron_nuwa.data.shards import Fingerprints
from megatron_nuwa.data.text import LARGEST_VOCABULARY, TextTokenizer
from megatron_nuwa.decoders import DecodeError, DecodeLimits, DecodeSettings, media_kind
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, load_vqgan
from preprocessing.encoder import DeviceChoice, EncoderSettings, Precision
from preprocessing.filters import FilterSettings
from preprocessing.health import MOST_FAILURES
from preprocessing.isolation import SketchSettings
from preprocessing.ledger import ENCODE_RULES_VERSION, CorpusSettings, items_begun
from preprocessing.plan import PlanKey
from preprocessing.sources import Source, SourceItem, local_copy, named_as_source

CLIP_FRAMES = 10
CLIP_FRAMES_PER_SECOND = 2.5
# Frames that the VQ-GAN encodes at once. On a GPU they also fill the smallest feature maps.
BATCH_SIZES = {"cpu": 32, "cuda": 64}


class LimitOptions(Settings):
    """What one item may cost: not part of what is made, so that it can be raised."""

    attempts: int = Field(default=3, ge=1)
    decode_seconds: float = Field(default=DEFAULT_LIMITS.seconds, gt=0)
    decode_memory_gib: float = Field(default=DEFAULT_LIMITS.memory_gib, gt=0)
    download_gib: float = Field(default=DEFAULT_LIMITS.download_gib, gt=0)

    @property
    def costs(self) -> dict[str, object]:
        """These fields alone, by their names."""
        return self.model_dump(include=set(LimitOptions.model_fields))

    @property
    def limits(self) -> DecodeLimits:
        """The same for decoders."""
        return DecodeLimits(
            seconds=self.decode_seconds,
            memory_gib=self.decode_memory_gib,
            download_gib=self.download_gib,
        )


class TokenizeOptions(LimitOptions):
    """What `tokenize` is asked for; `frames` None follows the manifest's first item."""

    source: str | Path
    output: Path
    vqgan: Path
    bpe: Path
    sketch_vqgan: Path | None = None
    sketch_unlabelled: int | None = Field(default=None, ge=0)
    frames: int | None = Field(default=None, ge=1)
    frames_per_second: float | None = Field(default=None, gt=0)
    short_clips: Literal["skip", "pad", "faster"] = "skip"
    items_per_shard: int = Field(default=4096, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    long_captions: Literal["refuse", "truncate"] = "refuse"
    device: DeviceChoice = "auto"
    precision: Precision | None = None
    compiled: bool | None = None
    most_failures: float = Field(default=MOST_FAILURES, gt=0, le=1)
    retry_failed: bool = False
    decode_ranks_per_encoder: int = Field(default=0, ge=0)
    decode_threads: int = Field(default=1, ge=1)
    report: bool = True
    filters: Path | None = None
    decoder: Literal["ffmpeg", "pyav"] = "ffmpeg"


def load_tools(options: TokenizeOptions) -> tuple[Vqgan, TextTokenizer]:
    """The VQ-GAN and the BPE; `UserError` where a corpus cannot hold their tokens."""
    vqgan = load_vqgan(options.vqgan)
    if vqgan.config.classes is not None:
        raise UserError(
            f"--vqgan {options.vqgan} is a VQ-GAN of sketches; name one of pictures, and this one "
            "in --sketch-vqgan"
        )
    bpe = TextTokenizer.load(options.bpe)
    if bpe.vocabulary_size > LARGEST_VOCABULARY:
        raise UserError(
            f"BPE {options.bpe} has {bpe.vocabulary_size:,} tokens, and a corpus holds at most "
            f"{LARGEST_VOCABULARY:,}"
        )
    _check_codes(vqgan, options.vqgan)
    return vqgan, bpe


def load_sketch_vqgan(options: TokenizeOptions, vqgan: Vqgan) -> Vqgan | None:
    """VQ-GAN-Seg, None where no sketches are asked for; `UserError` where it does not fit."""
    path = options.sketch_vqgan
    if path is None:
        if options.sketch_unlabelled is not None:
            raise UserError("--sketch-unlabelled is given, but no --sketch-vqgan")
        return None
    sketch_vqgan = load_vqgan(path)
    if sketch_vqgan.config.classes is None:
        raise UserError(
            f"--sketch-vqgan {path} is a VQ-GAN of pictures; name a VQ-GAN-Seg, trained with "
            "vqgan.model.classes"
        )
    _check_codes(sketch_vqgan, path)
    if sketch_vqgan.grid_side != vqgan.grid_side:
        raise UserError(
            f"--sketch-vqgan {path} has grids of {sketch_vqgan.grid_side}² tokens, but --vqgan "
            f"{options.vqgan} has {vqgan.grid_side}²; they must have the same"
        )
    return sketch_vqgan


def _check_codes(vqgan: Vqgan, path: Path) -> None:
    if vqgan.config.codebook_size > LARGEST_VOCABULARY:
        raise UserError(
            f"VQ-GAN {path} has {vqgan.config.codebook_size:,} codes, and a corpus holds at most "
            f"{LARGEST_VOCABULARY:,}"
        )


def plan_key(options: TokenizeOptions, source: Source) -> PlanKey:
    """What the plan of these options depends on; media paths are relative to where one stands."""
    return PlanKey(
        source=f"{options.source} in {Path.cwd()}",
        manifest_sha256=source.fingerprint,
        items_per_shard=options.items_per_shard,
    )


def settle(
    options: TokenizeOptions,
    source: Source,
    vqgan: Vqgan,
    bpe: TextTokenizer,
    sketch_vqgan: Vqgan | None = None,
) -> CorpusSettings:
    """Every setting of the corpus, defaults filled in."""
    # Of a corpus that was begun, all rows have been checked and counted.
    items = items_begun(options.output, source) or len(source)
    _check_shards(options, items)
    encoder = EncoderSettings.chosen(options.device, options.precision, options.compiled)
    frames = options.frames or _default_frames(source, options.limits)
    decode = _decode_settings(options, frames, vqgan.config.image_size)
    return CorpusSettings(
        manifest_sha256=source.fingerprint,
        manifest_items=items,
        decode=decode,
        grid_side=vqgan.grid_side,
        codebook_size=vqgan.config.codebook_size,
        text_vocabulary_size=bpe.vocabulary_size,
        fingerprints=Fingerprints(
            vqgan=fingerprint(vqgan),
            bpe=bpe.fingerprint,
            decode=decode.fingerprint(),
            sketch=None if sketch_vqgan is None else fingerprint(sketch_vqgan),
        ),
        items_per_shard=options.items_per_shard,
        batch_size=options.batch_size or BATCH_SIZES[encoder.device],
        long_captions=options.long_captions,
        encode_rules=ENCODE_RULES_VERSION,
        encoder=encoder,
        filters=load_settings(FilterSettings, options.filters, noun="--filters")
        if options.filters
        else FilterSettings(),
        sketch=_sketch_settings(options, sketch_vqgan),
    )


def _check_shards(options: TokenizeOptions, items: int) -> None:
    """`UserError` where the names of shards would not do."""
    shards = -(-items // options.items_per_shard)
    if shards > MOST_SHARDS:
        raise UserError(
            f"--items-per-shard {options.items_per_shard} makes {shards:,} shards of {items:,} "
            f"items, and a corpus has at most {MOST_SHARDS:,}; use at least "
            f"{-(-items // MOST_SHARDS)}"
        )


def _sketch_settings(options: TokenizeOptions, sketch_vqgan: Vqgan | None) -> SketchSettings | None:
    if sketch_vqgan is None:
        return None
    config = sketch_vqgan.config
    assert config.classes is not None
    return SketchSettings(
        image_size=config.image_size,
        classes=config.classes,
        codebook_size=config.codebook_size,
        unlabelled=options.sketch_unlabelled,
    )


def _decode_settings(options: TokenizeOptions, frames: int, image_size: int) -> DecodeSettings:
    if frames == 1:
        if options.frames_per_second is not None:
            raise UserError("--fps is given, but a corpus of images has no frame rate")
        return DecodeSettings(image_size=image_size)
    return DecodeSettings(
        image_size=image_size,
        frames=frames,
        frames_per_second=options.frames_per_second or CLIP_FRAMES_PER_SECOND,
        short_clips=options.short_clips,
        backend=options.decoder,
    )


def _default_frames(items: Iterable[SourceItem], limits: DecodeLimits) -> int:
    """1 where the first item that can be read is an image, else the paper's 10."""
    complaint = None
    for item in items:
        try:
            with local_copy(item.media, limits) as path, named_as_source(item.media, path):
                return 1 if media_kind(path) == "image" else CLIP_FRAMES
        except DecodeError as error:
            complaint = complaint or error
    raise UserError(f"not one media file of the manifest can be read; the first: {complaint}")
