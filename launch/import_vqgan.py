"""Take over a VQ-GAN of taming-transformers from its checkpoint and its published YAML. Example:

python launch/import_vqgan.py last.ckpt --config model.yaml --output vqgan.safetensors

The checkpoint is a Lightning .ckpt, a PyTorch state dict or a safetensors file; nothing in it is
run. The file that is written is taken by tokenizers.vqgan=FILE, by preprocessing's --vqgan, and by
vqgan.start=FILE to train it further.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_nuwa.command_line import CommandParser, example_in, output_file, whole_number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.models.taming import load_taming
from megatron_nuwa.models.vqgan import fingerprint, save_vqgan


def main() -> None:
    """Convert one checkpoint."""
    arguments = _arguments()
    output: Path = arguments.output
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output} must end in .safetensors")
    if output.exists() and not arguments.overwrite:
        raise UserError(f"--output {output} exists already; name another, or pass --overwrite")
    model = load_taming(arguments.checkpoint, arguments.config, arguments.image_size)
    try:
        save_vqgan(model, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    config = model.config
    print(
        f"{output}: VQ-GAN of {config.image_size}² pixels to {config.grid_side}² tokens, "
        f"{config.codebook_size} codes; fingerprint {fingerprint(model)}"
    )


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python launch/import_vqgan.py",
        description=__doc__.split(" Example:")[0],
        example=example_in(__doc__),
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument(
        "--config", metavar="YAML", type=Path, required=True, help="with ddconfig and n_embed"
    )
    parser.add_argument("--output", metavar="FILE", type=output_file, required=True)
    parser.add_argument(
        "--image-size",
        metavar="N",
        type=whole_number(1),
        help="pixels a side (default: as it was trained)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
