"""Train tokenizers of 12,288 codes on the demo's media, and hold them against what they promise.

Example:

OMP_NUM_THREADS=1 python -m benchmarks.tokenizers --work runs/tokenizers --output benchmarks/results

Per seed one VQ-GAN on the clips and photographs, and one VQ-GAN-Seg on maps of colour classes made
from them; each by launch/train_vqgan.py, in a process of its own. A run that exists is reused.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.harness.codebook_use import codebook_use
from benchmarks.harness.colour_maps import COLOURS, write_sketches
from benchmarks.harness.options import CPU, add_output, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from megatron_nuwa.command_line import whole_number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.vqgan import load_vqgan

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = {
    "train": ("train-clips", "train-images"),
    "held_out": ("heldout-clips", "heldout-images"),
}
FRAMES, FRAMES_PER_SECOND = 8, 8.0
SCHEDULE = {"warmup_steps": 20, "decay": "cosine", "betas": [0.9, 0.95]}
# What is promised.
LEAST_USE, LEAST_ACCURACY, MOST_LOST_DB, MOST_RISE = 0.9, 0.95, 1.0, 1.5


def main() -> int:
    """Train and judge; exit code 1 where a promise is broken."""
    options = _parser().parse_args()
    media = options.media or _make_media(options.work / "media")
    manifests = {
        split: [media / f"{name}.jsonl" for name in names] for split, names in MANIFESTS.items()
    }
    sketches = {
        split: [
            write_sketches(path, options.work / "sketches" / path.stem, FRAMES, FRAMES_PER_SECOND)
            for path in paths
        ]
        for split, paths in manifests.items()
    }
    pictures, maps = [], []
    for seed in options.seeds:
        if "pictures" in options.kinds:
            run = options.work / f"pictures-{seed}"
            seconds = _train(run, seed, picture_settings(options.steps, options.codes), manifests)
            pictures.append({"seed": seed, "cpu_seconds": seconds, **judge_pictures(run)})
        if "maps" in options.kinds:
            run = options.work / f"maps-{seed}"
            seconds = _train(run, seed, map_settings(options.map_steps, options.codes), sketches)
            maps.append({"seed": seed, "cpu_seconds": seconds, **judge_maps(run)})
        # Wide enough for all columns where the output is no terminal.
        show(Console(width=max(120, Console().width)), pictures, maps)
    report = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "codes": options.codes,
        "steps": {"pictures": options.steps, "maps": options.map_steps},
        "promises": {"use": LEAST_USE, "pixel_accuracy": LEAST_ACCURACY},
        "pictures": pictures,
        "maps": maps,
    }
    write_json(options.output, report)
    broken = broken_promises(pictures, maps)
    for sentence in broken:
        print(f"broken: {sentence}", flush=True)
    return 1 if broken else 0


def picture_settings(steps: int, codes: int) -> dict[str, Any]:
    """A VQ-GAN for one processor core: 64² pixels to 8×8 tokens."""
    return {
        "model": _model(codes),
        "loss": {
            "perceptual_weight": 0.2,
            "perceptual": {"stages": 3},
            "adversarial": "hinge",
            "adversarial_weight": 0.1,
            "discriminator_start": steps // 2,
            "discriminator_channels": 32,
            "discriminator_layers": 2,
        },
        "optimizer": {"learning_rate": 1e-3, **SCHEDULE},
        "steps": steps,
        "batch_size": 32,
    }


def map_settings(steps: int, codes: int) -> dict[str, Any]:
    """A VQ-GAN-Seg of the same size."""
    return {
        "model": {**_model(codes), "classes": len(COLOURS)},
        "loss": {
            "reconstruction": "cross_entropy",
            "perceptual_weight": 0,
            "adversarial_weight": 0,
        },
        "optimizer": {"learning_rate": 2e-3, **SCHEDULE},
        "steps": steps,
        "batch_size": 16,
    }


def judge_pictures(run: Path) -> dict[str, Any]:
    """Use of the codebook, quality, and what came after the discriminator's start."""
    use = codebook_use(load_vqgan(run), np.load(run / "frames.npy", mmap_mode="r"))
    return {**use._asdict(), "use": use.use, **_evaluation(run), "after_start": _after_start(run)}


def judge_maps(run: Path) -> dict[str, Any]:
    """Accuracy on held-out maps, and what naming the commonest class everywhere would score."""
    counts = np.bincount(np.load(run / "held_out_frames.npy").ravel())
    return {**_evaluation(run), "chance": float(counts.max() / counts.sum())}


def broken_promises(
    pictures: Sequence[dict[str, Any]], maps: Sequence[dict[str, Any]]
) -> list[str]:
    """A sentence for each promise that the figures break."""
    broken = []
    for found in pictures:
        after, seed = found["after_start"], found["seed"]
        if found["use"] < LEAST_USE:
            broken.append(f"seed {seed}: {found['use']:.1%} of the codes that could be are in use")
        if not after["is_finite"] or after["skipped_steps"] or after["adversarial_scale"] < 1:
            broken.append(f"seed {seed}: steps are skipped, or losses are no numbers")
        if after["reconstruction_rise"] > MOST_RISE or after["psnr_change_db"] < -MOST_LOST_DB:
            broken.append(f"seed {seed}: the reconstruction is worse with the discriminator")
    for found in maps:
        if found["pixel_accuracy"] < LEAST_ACCURACY:
            broken.append(f"seed {found['seed']}: pixel accuracy {found['pixel_accuracy']:.2%}")
    return broken


def show(
    console: Console, pictures: Sequence[dict[str, Any]], maps: Sequence[dict[str, Any]]
) -> None:
    """Two tables."""
    table = Table(title="VQ-GAN on clips and photographs", title_justify="left")
    headings = ("seed", "codes in use", "could be", "use", "perplexity", "held-out PSNR", "SSIM")
    for heading in (*headings, "largest rise", "PSNR since", "skipped", "CPU s"):
        table.add_column(heading, justify="right")
    for found in pictures:
        after = found["after_start"]
        table.add_row(
            str(found["seed"]),
            f"{found['used']:,}",
            f"{found['fillable']:,}",
            f"{found['use']:.1%}",
            f"{found['training_perplexity']:,.0f}",
            f"{found['psnr_db']:.2f} dB",
            f"{found['ssim']:.3f}",
            f"{after['reconstruction_rise']:.2f}×",
            f"{after['psnr_change_db']:+.2f} dB",
            f"{after['skipped_steps']:.0f}",
            f"{found['cpu_seconds']:.0f}",
        )
    console.print(table)
    table = Table(title="VQ-GAN-Seg on maps made from them", title_justify="left")
    for heading in ("seed", "pixel accuracy", "by chance", "FWIoU", "codes used", "CPU s"):
        table.add_column(heading, justify="right")
    for found in maps:
        table.add_row(
            str(found["seed"]),
            f"{found['pixel_accuracy']:.2%}",
            f"{found['chance']:.2%}",
            f"{found['fwiou']:.2%}",
            f"{found['used_fraction']:.1%}",
            f"{found['cpu_seconds']:.0f}",
        )
    console.print(table)


def _after_start(run: Path) -> dict[str, Any]:
    """What the log says of the time since the discriminator started."""
    start = yaml.safe_load((run / "recipe.yaml").read_text())["vqgan"]["loss"][
        "discriminator_start"
    ]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    tag = "train/loss/reconstruction"
    before = [line[tag] for line in lines if tag in line and line["step"] <= start]
    # Means of a few log lines, as single batches differ from one another.
    level = float(np.mean(before[-5:]))
    after = [line[tag] for line in lines if tag in line and line["step"] > start]
    smooth = np.convolve(after, np.ones(min(5, len(after))) / min(5, len(after)), "valid")
    quality = [(line["step"], line["eval/psnr"]) for line in lines if "eval/psnr" in line]
    at_start = [psnr for step, psnr in quality if step <= start][-1]
    numbers = [value for line in lines if line["step"] > start for value in line.values()]
    return {
        "is_finite": bool(np.isfinite(numbers).all()),
        "reconstruction_rise": float(smooth.max() / level),
        "psnr_change_db": quality[-1][1] - at_start,
        "skipped_steps": max(line.get("train/skipped_steps", 0) for line in lines),
        "adversarial_scale": min(line.get("train/adversarial_scale", 1) for line in lines),
    }


def _evaluation(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "evaluation.json").read_text()))


def _model(codes: int) -> dict[str, Any]:
    return {
        "image_size": 64,
        "downsampling": 8,
        "patch_size": 4,
        "base_channels": 32,
        "channel_multipliers": [2, 4],
        "residual_blocks": 1,
        "attention": False,
        "codebook_size": codes,
        "code_dim": 64,
        "lookup_dim": 8,
    }


def _train(
    run: Path, seed: int, settings: dict[str, Any], manifests: dict[str, list[Path]]
) -> float:
    """Train unless the run is finished; returns the seconds of processor time that it took."""
    steps = settings["steps"]
    vqgan = {
        "run": str(run),
        "data": {
            **{split: [str(path) for path in paths] for split, paths in manifests.items()},
            "frames": FRAMES,
            "frames_per_second": FRAMES_PER_SECOND,
            "decode_size": 72,
            "flip": True,
            "cache_frames": True,
        },
        "codebook": {
            "start_step": steps // 10,
            "kmeans_vectors": 4 * settings["model"]["codebook_size"],
            "kmeans_iterations": 5,
            # A short training has little time to bring all codes to where the vectors are.
            "restart_every": 5,
            "usage_decay": 0.9,
        },
        "ema_decay": 0.99,
        "log_every": max(1, steps // 60),
        "evaluate_every": steps // 2,
        "checkpoint_every": steps,
        **settings,
    }
    recipe, record = run / "given.yaml", run / "cpu_seconds.txt"
    text = yaml.safe_dump({"name": run.name, "seed": seed, "vqgan": vqgan})
    if recipe.is_file() and recipe.read_text() != text:
        raise UserError(f"{run} is a run with other settings; name another folder with --work")
    if record.is_file():
        return float(record.read_text())
    run.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run([sys.executable, str(ROOT / "launch/train_vqgan.py"), str(recipe)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    write_text_atomically(record, f"{seconds}\n")
    return seconds


def _make_media(folder: Path) -> Path:
    if not (folder / "train-clips.jsonl").is_file():
        _run([sys.executable, "-m", "launch.demo.media", "--output", str(folder)])
    return folder


def _run(command: Sequence[str]) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{' '.join(command)} failed; see above")


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("tokenizers", __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for media and runs")
    parser.add_argument("--media", type=Path, help="the demo's media (default: made in --work)")
    parser.add_argument(
        "--kinds", nargs="+", choices=("pictures", "maps"), default=("pictures", "maps")
    )
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=300, help="of a VQ-GAN (default: 300)")
    parser.add_argument(
        "--map-steps", type=positive, default=1600, help="of a VQ-GAN-Seg (default: 1600)"
    )
    parser.add_argument("--codes", type=positive, default=12288, help="(default: 12288)")
    add_output(parser, CPU)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
