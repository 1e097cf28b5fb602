"""Commands that make and inspect a token corpus: `python -m preprocessing --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.data.shards import CorpusManifest
from megatron_nuwa.data.text import train_bpe
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.training.progress import track
from preprocessing.command_line import parser
from preprocessing.communicator import Communicator, join_ranks, on_every_rank, run_ranks
from preprocessing.farm import tokenize
from preprocessing.merge import merge
from preprocessing.options import TokenizeOptions
from preprocessing.shot_manifest import ShotOptions, write_shots
from preprocessing.sources import read_source
from preprocessing.split import split
from preprocessing.stats import corpus_table
from preprocessing.verify import find_damage

T = TypeVar("T", bound=Settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    communicator = join_ranks()
    return run_ranks(communicator, lambda: _run(arguments, communicator))


def _run(arguments: Sequence[str] | None, communicator: Communicator) -> int:
    options = on_every_rank(communicator, lambda: parser().parse_args(arguments))
    if options.command == "tokenize":
        _tokenize(options, communicator)
        return 0
    if options.command == "shots":
        _shots(options, communicator)
        return 0
    if communicator.rank:
        return 0
    if options.command == "verify":
        return _verify(options)
    if options.command == "stats":
        Console().print(corpus_table(options.corpus))
        return 0
    {"merge": _merge, "split": _split, "train-bpe": _train_bpe}[options.command](options)
    return 0


def _tokenize(options: argparse.Namespace, communicator: Communicator) -> None:
    tokenize(_settings(TokenizeOptions, options, communicator), communicator)


def _shots(options: argparse.Namespace, communicator: Communicator) -> None:
    write_shots(_settings(ShotOptions, options, communicator), communicator)


def _settings(kind: type[T], options: argparse.Namespace, communicator: Communicator) -> T:
    tree = {key: value for key, value in vars(options).items() if key not in ("command", "parser")}
    origin, flags = f"the arguments of {options.command}", options.parser.flags()
    return on_every_rank(communicator, lambda: parse_settings(kind, tree, origin, flags))


def _verify(options: argparse.Namespace) -> int:
    damage = find_damage(options.corpus, options.full)
    for sentence in damage:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    if damage:
        return 1
    depth = "every byte read" if options.full else "sizes and sums checked"
    print(f"corpus {options.corpus} is good ({depth})", flush=True)
    return 0


def _merge(options: argparse.Namespace) -> None:
    _show_made(options.output, merge(options.corpora, options.output))


def _split(options: argparse.Namespace) -> None:
    outputs = (options.output_train, options.output_heldout)
    for output, made in zip(
        outputs, split(options.corpus, options.held_out, *outputs), strict=True
    ):
        _show_made(output, made)


def _show_made(folder: Path, manifest: CorpusManifest) -> None:
    counts, shards = manifest.counts, len(manifest.shards)
    print(
        f"corpus {folder}: {counts.items:,} items, {counts.captions:,} captions, {shards:,} shards",
        flush=True,
    )


def _train_bpe(options: argparse.Namespace) -> None:
    size = options.vocabulary_size
    if options.output.suffix != ".json":
        raise UserError(f"--output {options.output} must end in .json")
    if options.output.exists() and not options.overwrite:
        raise UserError(
            f"--output {options.output} exists already; name another, or pass --overwrite"
        )
    bpe = train_bpe(_captions(options.source), size)
    try:
        bpe.save(options.output)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written: {error.strerror}") from error
    fewer = f"; the captions hold too few pairs for {size:,}" if bpe.vocabulary_size < size else ""
    print(f"BPE {options.output}: {bpe.vocabulary_size:,} tokens{fewer}", flush=True)


def _captions(sources: Sequence[str]) -> Iterator[str]:
    for name in sources:
        source = read_source(name, is_shown=True)
        for item in track(source, f"items of {name} read"):
            yield from item.captions


if __name__ == "__main__":
    sys.exit(main())
