"""Commands that make and inspect a token corpus: `python -m preprocessing --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from megatron_nuwa.config import parse_settings
from megatron_nuwa.data.shards import CorpusManifest
from megatron_nuwa.data.text import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, train_bpe
from megatron_nuwa.errors import UserError
from preprocessing.communicator import Communicator, join_ranks, on_every_rank, run_ranks
from preprocessing.farm import tokenize
from preprocessing.merge import merge
from preprocessing.options import TokenizeOptions
from preprocessing.sources import read_source
from preprocessing.split import split
from preprocessing.stats import corpus_table
from preprocessing.verify import find_damage

SOURCE_HELP = (
    "manifest (.jsonl, .csv or .parquet with id, media, captions [start, end, sketch]), webdataset "
    "tars (x.tar, x-{000..041}.tar) or a folder; a path or any fsspec address (s3://…)"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code."""
    communicator = join_ranks()
    return run_ranks(communicator, lambda: _run(arguments, communicator))


def _run(arguments: Sequence[str] | None, communicator: Communicator) -> int:
    options = on_every_rank(communicator, lambda: _parser().parse_args(arguments))
    if options.command == "tokenize":
        _tokenize(options, communicator)
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
    tree = {key: value for key, value in vars(options).items() if key != "command"}
    tokenize(
        on_every_rank(
            communicator, lambda: parse_settings(TokenizeOptions, tree, "the arguments of tokenize")
        ),
        communicator,
    )


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
    if not SMALLEST_VOCABULARY <= size <= LARGEST_VOCABULARY:
        raise UserError(
            f"--vocabulary-size must lie between {SMALLEST_VOCABULARY} and {LARGEST_VOCABULARY}, "
            f"not {size}"
        )
    if options.output.suffix != ".json":
        raise UserError(f"--output {options.output} must end in .json")
    bpe = train_bpe(_captions(options.source), size)
    try:
        bpe.save(options.output)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written: {error.strerror}") from error
    fewer = f"; the captions hold too few pairs for {size:,}" if bpe.vocabulary_size < size else ""
    print(f"BPE {options.output}: {bpe.vocabulary_size:,} tokens{fewer}", flush=True)


def _captions(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        for item in read_source(source):
            yield from item.captions


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m preprocessing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_tokenize(commands)
    verify = _add(
        commands,
        "verify",
        "check a corpus; exit code 1 where it is damaged",
        "python -m preprocessing verify corpora/vatex --full",
    )
    verify.add_argument("corpus", type=Path, help="folder of the corpus")
    verify.add_argument("--full", action="store_true", help="read every byte, not only the sizes")
    stats = _add(
        commands,
        "stats",
        "show what a corpus holds",
        "python -m preprocessing stats corpora/vatex",
    )
    stats.add_argument("corpus", type=Path, help="folder of the corpus")
    _add_merge(commands)
    _add_split(commands)
    bpe = _add(
        commands,
        "train-bpe",
        "learn a BPE vocabulary from the captions of manifests",
        "python -m preprocessing train-bpe images.jsonl clips.jsonl --output bpe.json "
        "--vocabulary-size 16384",
    )
    bpe.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    bpe.add_argument("--output", type=Path, required=True, help="file to write, .json")
    bpe.add_argument("--vocabulary-size", type=int, required=True, metavar="N")
    return parser


def _add_merge(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add(
        commands,
        "merge",
        "make one corpus of several that were tokenized with the same settings",
        "python -m preprocessing merge corpora/vatex corpora/msrvtt --output corpora/clips",
    )
    parser.add_argument(
        "corpora", type=Path, nargs="+", metavar="CORPUS", help="folders of the corpora, in order"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the new corpus")


def _add_split(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add(
        commands,
        "split",
        "divide a corpus for training and evaluation; clips of one video stay together",
        "python -m preprocessing split corpora/vatex --held-out 0.05 "
        "--output-train corpora/vatex_train --output-heldout corpora/vatex_heldout",
    )
    parser.add_argument("corpus", type=Path, help="folder of the corpus")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the media files that is held out (default: 0.05)",
    )
    for side in ("train", "heldout"):
        parser.add_argument(f"--output-{side}", type=Path, required=True, metavar="FOLDER")


def _add_tokenize(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add(
        commands,
        "tokenize",
        "turn media and captions into a token corpus; a repeated command completes what is missing",
        "mpirun -n 8 python -m preprocessing tokenize vatex.jsonl --output corpora/vatex "
        "--vqgan runs/vqgan --bpe bpe.json --frames 10 --fps 2.5",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus")
    parser.add_argument(
        "--vqgan", type=Path, required=True, help="run folder or .safetensors file of the VQ-GAN"
    )
    parser.add_argument(
        "--bpe", type=Path, required=True, help="BPE .json, or CLIP's merges file (.txt, .txt.gz)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="frames of an item; 1 for images (default: 1 or 10, as the manifest's first item is)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        dest="frames_per_second",
        help="frames a second that are taken from clips (default: 2.5)",
    )
    parser.add_argument(
        "--short-clips",
        choices=("skip", "pad", "faster"),
        default="skip",
        help="what happens to a clip of too few frames; pad repeats its last, faster samples it "
        "at a higher rate (default: skip)",
    )
    parser.add_argument(
        "--items-per-shard", type=int, default=4096, metavar="N", help="default: 4096"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="frames that the VQ-GAN encodes at once (default: 32 on CPUs, 64 on GPUs)",
    )
    parser.add_argument(
        "--long-captions",
        choices=("refuse", "truncate"),
        default="refuse",
        help="what happens to captions of more than 77 tokens (default: refuse the item)",
    )
    _add_farm_arguments(parser.add_argument_group("the farm"))


def _add_farm_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the VQ-GAN runs (default: on GPUs where there are any)",
    )
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the VQ-GAN's convolutions (default: bfloat16 on GPUs, float32 on CPUs)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        dest="compiled",
        help="compile the VQ-GAN (default: on GPUs)",
    )
    group.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="how often a media file is tried before its item counts as failed (default: 3)",
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="try the failed items of a corpus again"
    )
    group.add_argument(
        "--decode-ranks-per-encoder",
        type=int,
        default=0,
        metavar="N",
        help="ranks that only decode, for each that encodes; with 0 every rank does both "
        "(default: 0)",
    )
    group.add_argument(
        "--decode-threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of a rank that decode (default: 1)",
    )
    group.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write CORPUS.farm/report.html at the end (default: yes)",
    )


def _add(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, example: str
) -> _Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
