"""Cut the demo's captioned clips and images out of the media that installed packages carry.

Each gets a sketch, too.

python -m launch.demo.media --output runs/demo/media
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

from PIL import Image

from launch.demo.catalogue import Catalogue, Cut, Video, clip_cuts, image_cuts, load_catalogue
from launch.demo.sketches import draw_sketch
from launch.workflow.media import find_package_file, replaced_folder
from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError, run_command

TRUNCATED_ID = "deliberately-truncated"
# Ends the name of an image that is the first frame of a clip.
STILL_SUFFIX = "-still"
PROVENANCE = "provenance.jsonl"
FFMPEG_TIMEOUT_SECONDS = 300

# Constant quality far above what 64 pixels can show; metadata off, so that the same input gives
# the same bytes.
_ENCODER = (
    *("-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "12", "-pix_fmt", "yuv420p"),
    *("-threads", "1", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
)
_STILL_ENCODER = ("-frames:v", "1", "-update", "1", "-q:v", "2", "-threads", "1", "-bitexact")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = CommandParser(
        prog="python -m launch.demo.media",
        description="Cut captioned clips and images out of the packages in demo-media.txt.",
        example="python -m launch.demo.media --output runs/demo/media",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; replaced as a whole"
    )
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    counts = gather_media(options.output, load_catalogue())
    print(
        f"{options.output}: {counts['train-clips']} clips and {counts['train-images']} images to "
        f"train on, {counts['heldout-clips']} clips and {counts['heldout-images']} images held "
        f"out, in {time.monotonic() - begin:.1f} s"
    )
    return 0


def gather_media(output: Path, catalogue: Catalogue) -> Counter[str]:
    """Write clips, images, four manifests and `provenance.jsonl`; returns items per manifest.

    The folder appears as a whole or not at all. Raises `UserError` where a package is missing.
    """
    wanted = [(video.package, video.path) for video in catalogue.videos]
    wanted += [(photograph.package, photograph.path) for photograph in catalogue.photographs]
    files = {(package, path): find_package_file(package, path) for package, path in wanted}
    with replaced_folder(output, PROVENANCE) as partial:
        cuts = _cut_everything(partial, catalogue, files)
        _draw_sketches(partial, [media for _, media in cuts])
        return _write_manifests(partial, cuts)


def _cut_everything(
    folder: Path, catalogue: Catalogue, files: dict[tuple[str, str], Path]
) -> list[tuple[Cut, str]]:
    """Cut all media into `folder`; returns every cut with its file, in catalogue order."""
    for name in ("clips", "images"):
        (folder / name).mkdir()
    made: list[tuple[Cut, str]] = []
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        jobs = {}
        for video in catalogue.videos:
            cuts = list(clip_cuts(catalogue, video))
            for cut in cuts:
                made += [(cut, f"clips/{cut.id}.mp4"), (cut, f"images/{cut.id}{STILL_SUFFIX}.jpg")]
            source = files[video.package, video.path]
            jobs[pool.submit(_cut_video, source, video, cuts, folder, catalogue.side)] = video
        for photograph in catalogue.photographs:
            stills = list(image_cuts(photograph))
            made += [(cut, f"images/{cut.id}.jpg") for cut in stills]
            _cut_photograph(files[photograph.package, photograph.path], stills, folder, catalogue)
        print(f"cut the crops of {len(catalogue.photographs)} photographs", flush=True)
        for job in as_completed(jobs):
            print(f"cut {job.result()} clips of {jobs[job].path}", flush=True)
    return made


def _cut_video(source: Path, video: Video, cuts: Sequence[Cut], folder: Path, side: int) -> int:
    """Cut all clips of one video, and each clip's first frame as an image; returns their number.

    One ffmpeg does it all, so that the video is decoded once.
    """
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-xerror", "-y"]
    command += ["-threads", "1", "-i", str(source), "-filter_complex", _filter_graph(cuts, side)]
    for number, cut in enumerate(cuts):
        command += ["-map", f"[clip{number}]", *_ENCODER, str(folder / f"clips/{cut.id}.mp4")]
        still = str(folder / f"images/{cut.id}{STILL_SUFFIX}.jpg")
        command += ["-map", f"[still{number}]", *_STILL_ENCODER, still]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=FFMPEG_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"ffmpeg could not cut {source}: {' '.join(reason)}")
    return len(cuts)


def _filter_graph(cuts: Sequence[Cut], side: int) -> str:
    """ffmpeg's filter graph: square pixels, then one crop a view, then one trim a clip."""
    by_view: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number, cut in enumerate(cuts):
        by_view[cut.view].append(number)
    views = "".join(f"[view{v}]" for v in range(len(by_view)))
    parts = [f"[0:v]scale=trunc(iw*sar/2)*2:ih,setsar=1,split={len(by_view)}{views}"]
    for v, ((x, y, width), numbers) in enumerate(by_view.items()):
        branches = "".join(f"[cut{n}]" for n in numbers)
        parts.append(
            f"[view{v}]crop={width}:{width}:{x}:{y}:exact=1,scale={side}:{side}:flags=lanczos,"
            f"split={len(numbers)}{branches}"
        )
        parts += [
            f"[cut{n}]trim=start={cuts[n].start}:duration={cuts[n].seconds},"
            f"setpts=PTS-STARTPTS,split=2[clip{n}][still{n}]"
            for n in numbers
        ]
    return ";".join(parts)


def _cut_photograph(source: Path, cuts: Iterable[Cut], folder: Path, catalogue: Catalogue) -> None:
    with Image.open(source) as opened:
        photograph = opened.convert("RGB")
    for cut in cuts:
        x, y, width = cut.view
        if x + width > photograph.width or y + width > photograph.height:
            raise ValueError(f"the view {cut.view} lies outside the photograph '{cut.source}'")
        crop = photograph.crop((x, y, x + width, y + width))
        crop = crop.resize((catalogue.side, catalogue.side), Image.Resampling.LANCZOS)
        crop.save(folder / f"images/{cut.id}.jpg", quality=95, subsampling=0)


def _draw_sketches(folder: Path, media: Sequence[str]) -> None:
    """Draw the sketch of every image and clip."""
    (folder / "sketches").mkdir()
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(draw_sketch, folder / each, folder / _sketch_of(each)) for each in media
        ]
        for job in jobs:
            job.result()
    print(f"drew the sketches of {len(media)} images and clips", flush=True)


def _sketch_of(media: str) -> str:
    path = Path(media)
    return f"sketches/{path.stem}{'.gif' if path.suffix == '.mp4' else '.png'}"


def _write_manifests(folder: Path, made: Sequence[tuple[Cut, str]]) -> Counter[str]:
    """Write the four manifests and the provenance of every file; returns items per manifest."""
    manifests: dict[str, list[dict[str, object]]] = defaultdict(list)
    provenance: list[dict[str, object]] = []
    for cut, media in made:
        kind = Path(media).parent.name
        name = f"{'heldout' if cut.heldout else 'train'}-{kind}"
        manifests[name].append(
            {
                "id": Path(media).stem,
                "media": media,
                "captions": list(cut.captions),
                "sketch": _sketch_of(media),
            }
        )
        provenance.append(
            {
                "id": Path(media).stem,
                "manifest": name,
                "source": cut.source,
                "package": cut.package,
                "version": metadata.version(cut.package),
                "path": cut.path,
                "view": list(cut.view),
                "start": cut.start,
                "end": None if cut.start is None else round(cut.start + (cut.seconds or 0.0), 3),
                "media": media,
                "sha256": _sha256(folder / media),
                "sketch": _sketch_of(media),
                "sketch_sha256": _sha256(folder / _sketch_of(media)),
            }
        )
    manifests["train-clips"].append(_truncated_clip(folder, made))
    for name, lines in manifests.items():
        _write_json_lines(folder / f"{name}.jsonl", lines)
    _write_json_lines(folder / PROVENANCE, provenance)
    return Counter({name: len(lines) for name, lines in manifests.items()})


def _truncated_clip(folder: Path, made: Sequence[tuple[Cut, str]]) -> dict[str, object]:
    """A clip cut short in the middle, as an interrupted copy leaves it: the farm must skip it."""
    cut, media = next((cut, media) for cut, media in made if media.endswith(".mp4"))
    whole = (folder / media).read_bytes()
    broken = f"clips/{TRUNCATED_ID}.mp4"
    (folder / broken).write_bytes(whole[: len(whole) // 2])
    captions = list(cut.captions)
    return {"id": TRUNCATED_ID, "media": broken, "captions": captions, "sketch": _sketch_of(media)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json_lines(path: Path, lines: Iterable[dict[str, object]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
