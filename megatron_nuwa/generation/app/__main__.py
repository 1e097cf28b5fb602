"""A local page on which one picks a task, types, draws, and watches frames arrive. Example:

python -m megatron_nuwa.generation.app --run runs/demo/pretrain
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from megatron_nuwa.command_line import CommandParser, whole_number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.generation.trained import open_generator

# Read when gradio and huggingface_hub are imported: neither is to call home.
OFFLINE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m megatron_nuwa.generation.app",
        description="Serve a page that generates with a trained run, to this machine only.",
        example="python -m megatron_nuwa.generation.app --run runs/demo/pretrain",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a pretraining run, or a checkpoint")
    source.add_argument("--model", type=Path, metavar="FILE", help="a file of launch/export.py")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port", type=whole_number(1, 65535), default=7860, help="(default %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Serve until interrupted."""
    arguments = parse_arguments()
    # What ends a service or a container ends the page as Ctrl+C does, which tidies up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="megatron_nuwa.") as name:
        folder = Path(name).resolve()
        # Otherwise gradio keeps what it shows and what visitors upload, for good.
        os.environ.update(OFFLINE | {"GRADIO_TEMP_DIR": str(folder)})
        serve(arguments, folder)


def serve(arguments: argparse.Namespace, folder: Path) -> None:
    """Serve a page that writes its files below `folder`."""
    try:
        from megatron_nuwa.generation.app.page import build_page, serving
    except ImportError as error:
        raise UserError(
            f"the page needs gradio ({error}); install it: pip install 'gradio>=6'"
        ) from error
    source, field = (
        (arguments.run, "--run") if arguments.model is None else (arguments.model, "--model")
    )
    page = build_page(open_generator(source, field), folder)
    print(f"serving http://{arguments.host}:{arguments.port} (Ctrl+C ends it)", flush=True)
    try:
        page.launch(server_name=arguments.host, server_port=arguments.port, **serving())
    except OSError as error:
        raise UserError(f"--port {arguments.port} cannot be used: {error}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
