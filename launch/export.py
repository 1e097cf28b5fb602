"""Write a trained model to one safetensors file, or say what such a file holds. Examples:

python launch/export.py model runs/demo/pretrain --output demo.safetensors
python launch/export.py vqgan runs/demo/vqgan --output vqgan.safetensors
python launch/export.py show demo.safetensors

The file of a model carries its tokenizers, and is taken by

python launch/generate.py t2v --model demo.safetensors --prompt "a rocket"
deepspeed launch/pretrain.py RECIPE run=runs/tuned start.weights=demo.safetensors

The file of a VQ-GAN is taken by tokenizers.vqgan=FILE, and by vqgan.start=FILE to train it further.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from megatron_nuwa.command_line import CommandParser, example_in, output_file
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.models.vqgan import fingerprint, is_vqgan_file, load_vqgan, save_vqgan
from megatron_nuwa.training.trained_model import export, open_trained

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python launch/export.py",
        description="Write a trained model to one safetensors file.",
        example=example_in(__doc__),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    model = commands.add_parser(
        "model",
        help="a pretraining run, with its tokenizers",
        description="Write a pretraining run to one file, with its tokenizers.",
        example="python launch/export.py model runs/demo/pretrain --output my.safetensors",
    )
    model.add_argument("source", metavar="RUN", type=Path, help="a run, or one of its checkpoints")
    model.add_argument(
        "--precision",
        choices=[*PRECISIONS],
        default="fp32",
        help="of the weights: fp32 (default), also what a bf16 run trained in; less to generate",
    )
    vqgan = commands.add_parser(
        "vqgan",
        help="a VQ-GAN run",
        description="Write a VQ-GAN to one file.",
        example="python launch/export.py vqgan runs/demo/vqgan --output vqgan.safetensors",
    )
    vqgan.add_argument("source", metavar="RUN", type=Path, help="a VQ-GAN run, or a checkpoint")
    for command in (model, vqgan):
        command.add_argument("--output", metavar="FILE", type=output_file, required=True)
        command.add_argument(
            "--overwrite", action="store_true", help="replace FILE where it exists"
        )
    show = commands.add_parser(
        "show",
        help="say what a file holds",
        description="Say what a file holds.",
        example="python launch/export.py show demo.safetensors",
    )
    show.add_argument("source", metavar="FILE", type=Path)
    return parser.parse_args()


def main() -> None:
    """Carry out one command."""
    arguments = parse_arguments()
    if arguments.command == "show":
        print(description_of(arguments.source))
        return
    output: Path = arguments.output
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output} must end in .safetensors")
    if output.exists() and not arguments.overwrite:
        raise UserError(f"--output {output} exists already; name another, or pass --overwrite")
    if arguments.command == "model":
        trained, dtype = open_trained(arguments.source, "RUN"), PRECISIONS[arguments.precision]
        write = partial(export, trained, output, dtype)
    else:
        write = partial(save_vqgan, load_vqgan(arguments.source), output)
    try:
        write()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    print(description_of(output))


def description_of(path: Path) -> str:
    """What an exported file holds, in a few lines."""
    if is_vqgan_file(path):
        vqgan = load_vqgan(path)
        config = vqgan.config
        return (
            f"{path}: VQ-GAN of {config.image_size}² pixels to {config.grid_side}² tokens, "
            f"{config.codebook_size} codes of {config.code_dim}; fingerprint {fingerprint(vqgan)}"
        )
    trained = open_trained(path, "FILE")
    facts, sketch_vqgan = trained.facts, trained.sketch_vqgan()
    with torch.device("meta"):
        total = Nuwa(facts.model).parameter_counts()["total"]
    grids = ", ".join(f"{task} {h}×{w}×{s}" for task, (h, w, s) in facts.grids.items())
    return (
        f"{path}: model of {total / 1e6:.2f} M parameters after {facts.step} steps\n"
        f"trained on {grids}\n"
        f"VQ-GAN {fingerprint(trained.vqgan())}\nBPE {trained.bpe().fingerprint}"
        + ("" if sketch_vqgan is None else f"\nVQ-GAN-Seg {fingerprint(sketch_vqgan)}")
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
