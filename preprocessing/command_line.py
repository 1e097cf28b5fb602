"""The arguments of the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_nuwa.command_line import CommandParser, output_file, whole_number
from megatron_nuwa.data.text import LARGEST_VOCABULARY, SMALLEST_VOCABULARY
from preprocessing.health import MOST_FAILURES

SOURCE_HELP = (
    "manifest (.jsonl, .csv or .parquet with id, media, captions [start, end, sketch]), webdataset "
    "tars (x.tar, x-{000..041}.tar) or a folder; a path or any fsspec address (s3://…)"
)


def parser() -> CommandParser:
    """The parser of all commands, which leaves that of the command in `parser`."""
    description = "Commands that make and inspect a token corpus."
    example = "python -m preprocessing stats corpora/vatex    # each COMMAND has its own --help"
    whole = CommandParser(prog="python -m preprocessing", description=description, example=example)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_tokenize(commands)
    _add_shots(commands)
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
    bpe.add_argument("--output", type=output_file, required=True, help="file to write, .json")
    bpe.add_argument(
        "--vocabulary-size",
        type=whole_number(SMALLEST_VOCABULARY, LARGEST_VOCABULARY),
        required=True,
        metavar="N",
        help=f"tokens to learn, {SMALLEST_VOCABULARY:,} to {LARGEST_VOCABULARY:,}; they are fewer "
        "where the captions hold too few pairs",
    )
    bpe.add_argument("--overwrite", action="store_true", help="replace the file where it exists")
    return whole


def _add_merge(commands: argparse._SubParsersAction[CommandParser]) -> None:
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


def _add_split(commands: argparse._SubParsersAction[CommandParser]) -> None:
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
    for side, what in (("train", "to train on"), ("heldout", "that is held out")):
        parser.add_argument(
            f"--output-{side}",
            type=Path,
            required=True,
            metavar="FOLDER",
            help=f"folder of the new corpus {what}",
        )


def _add_shots(commands: argparse._SubParsersAction[CommandParser]) -> None:
    parser = _add(
        commands,
        "shots",
        "write a manifest whose items are the shots of another source's clips; a repeated command "
        "completes what is missing",
        "mpirun -n 8 --bind-to none python -m preprocessing shots films.jsonl --output shots.jsonl",
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--output", type=Path, required=True, help="manifest to write, .jsonl")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="probability above which a frame is taken for a cut (default: 0.5)",
    )
    _add_attempts(parser)
    _add_limits(
        parser, "time that decoding an item, or each minute of a longer one, may take, in seconds"
    )
    parser.add_argument(
        "--film-hours",
        type=float,
        default=24.0,
        metavar="H",
        help="length of a film, above which the item fails, since most such files only have a "
        "wrong time stamp (default: 24)",
    )


def _add_attempts(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="how often a media file is tried before its item counts as failed (default: 3)",
    )


def _add_limits(
    parser: argparse._ActionsContainer,
    seconds: str = "time that decoding one item may take, in seconds",
) -> None:
    """What one item may cost; `seconds` says what is timed."""
    for name, limit, unit, what in (
        ("--decode-seconds", "120", "S", seconds),
        ("--decode-memory-gib", "4", "GIB", "memory that decoding one item may take"),
        ("--download-gib", "4", "GIB", "size of a remote or packed medium"),
    ):
        parser.add_argument(
            name,
            type=float,
            default=float(limit),
            metavar=unit,
            help=f"{what}, before the item fails (default: {limit})",
        )


def _add_tokenize(commands: argparse._SubParsersAction[CommandParser]) -> None:
    parser = _add(
        commands,
        "tokenize",
        "turn media and captions into a token corpus; a repeated command completes what is missing",
        "mpirun -n 8 --bind-to none python -m preprocessing tokenize vatex.jsonl "
        "--output corpora/vatex --vqgan runs/vqgan --bpe bpe.json --frames 10 --fps 2.5",
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
        "--sketch-vqgan",
        type=Path,
        metavar="SKETCH_VQGAN",
        help="VQ-GAN-Seg that turns the items' sketches into tokens, too; every item must have one",
    )
    parser.add_argument(
        "--sketch-unlabelled",
        type=int,
        metavar="N",
        help="pixel value of sketches that becomes the last class, such as 255",
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
        "--items-per-shard",
        type=int,
        default=4096,
        metavar="N",
        help="items of the source that a shard is made of (default: 4096)",
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
    parser.add_argument(
        "--decoder",
        choices=("ffmpeg", "pyav"),
        default="ffmpeg",
        help="what decodes clips (default: ffmpeg)",
    )
    parser.add_argument(
        "--filters",
        type=Path,
        metavar="FILE",
        help="YAML file that names the filters and their settings (default: none)",
    )
    _add_farm_arguments(parser.add_argument_group("the farm"))


def _add_farm_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the VQ-GAN runs; auto takes GPUs where there are any, unless DS_ACCELERATOR is "
        "cpu (default: auto)",
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
    _add_attempts(group)
    group.add_argument(
        "--most-failures",
        type=float,
        default=MOST_FAILURES,
        metavar="SHARE",
        help="stop where a rank fails at more of 2,000 items in a row, as one without its media "
        f"does (default: {MOST_FAILURES}; 1 never stops)",
    )
    _add_limits(group)
    group.add_argument(
        "--retry-failed", action="store_true", help="try the failed items of a corpus again"
    )
    group.add_argument(
        "--decode-ranks-per-encoder",
        type=int,
        default=0,
        metavar="N",
        help="ranks that only decode, for each that encodes; with 0 every rank does both; a GPU "
        "has one rank that encodes, however many there are (default: 0)",
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
    commands: argparse._SubParsersAction[CommandParser], name: str, summary: str, example: str
) -> CommandParser:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", example=example
    )
    parser.set_defaults(parser=parser)
    return parser
