"""What is wrong with the nodes of a run, said before anything is allocated."""

from __future__ import annotations

import hashlib
import platform
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import torch

from megatron_nuwa.data.cache import DEFAULT_BYTES, DEFAULT_FOLDER, ShardCache
from megatron_nuwa.data.shards import CORPUS_FILE
from megatron_nuwa.data.storage import Storage, storage_at
from megatron_nuwa.errors import UserError
from megatron_nuwa.ops.backends import explain_auto
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training.fused import find_apex
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.speed_probe import Speeds, measure_speeds, slow_parts

_PACKAGES = ("torch", "deepspeed", "megatron-nuwa")
_MISSING = "not installed"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CGROUP = Path("/sys/fs/cgroup")
# Network file systems may show a new file a little later on other nodes.
_PATIENCE_SECONDS = 3.0
_MEMORY_ADVICE = (
    "end other programs there, or choose a layout with a smaller share a process (a higher ZeRO "
    "stage, more tensor or pipeline parallelism)"
)


@dataclass(frozen=True)
class ProcessReport:
    """What one process sees of itself and of the run's files."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    # The backend of nearby attention, and why it is not the device's own.
    attention: str
    attention_reason: str | None
    # Free memory of the process's GPU, and of its node; bytes.
    free_device_bytes: int | None
    free_host_bytes: int
    # By every corpus's address the sha256 of its manifest, or why that cannot be read.
    corpora: dict[str, str | UserError]
    sees_run_folder: bool

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"{self.host} (process {self.rank})"


@dataclass(frozen=True)
class Findings:
    """The same on every process: the reports by rank, what stops the run, what only slows it."""

    reports: list[ProcessReport]
    speeds: Speeds | None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def preflight(
    recipe: Recipe,
    layout: Layout,
    processes: Processes,
    *,
    bytes_needed: int | None = None,
    host_bytes_needed: int | None = None,
) -> list[str]:
    """Check all nodes of a run and return warnings about what only slows it.

    `bytes_needed` is the memory that one process needs on its device, `host_bytes_needed` what a
    GPU process needs beside it in its node's. Every process calls it. The first problem raises
    `UserError` on the first process and ends the others quietly.
    """
    findings = examine(
        recipe, layout, processes, bytes_needed=bytes_needed, host_bytes_needed=host_bytes_needed
    )
    processes.raise_first(findings.problems[0] if findings.problems else None)
    return findings.warnings


def examine(
    recipe: Recipe,
    layout: Layout,
    processes: Processes,
    *,
    bytes_needed: int | None = None,
    host_bytes_needed: int | None = None,
    measure_alone: bool = False,
) -> Findings:
    """All findings; every process calls it and gets the same ones.

    A lone process has nothing to be compared with, so its speed is measured only on
    `measure_alone`.
    """
    reports = processes.gather(_report(recipe, layout, processes))
    needs_host = bytes_needed if processes.device.type == "cpu" else host_bytes_needed
    needs_device = bytes_needed if processes.device.type == "cuda" else None
    problems = [
        *_size_problems(layout, processes),
        *_version_problems(reports),
        *_attention_problems(reports),
        *_run_folder_problems(reports, recipe),
        *_corpus_problems(reports),
        *_memory_problems(reports, needs_device, needs_host),
    ]
    hosts = [report.host for report in reports]
    speeds = None
    if processes.world_size > 1 or measure_alone:
        speeds = measure_speeds(processes, hosts)
    # Timings differ between processes, sentences about the gathered ones do not.
    warnings = _attention_warnings(reports)
    if speeds:
        warnings += slow_parts(speeds, hosts, on_gpus=processes.device.type == "cuda")
    return Findings(reports, speeds, problems, warnings)


def _report(recipe: Recipe, layout: Layout, processes: Processes) -> ProcessReport:
    device = processes.device
    on_gpu = device.type == "cuda"
    attention, reason = _attention(recipe, layout, device)
    return ProcessReport(
        rank=processes.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        versions=_versions(recipe),
        attention=attention,
        attention_reason=reason,
        free_device_bytes=torch.cuda.mem_get_info(device)[0] if on_gpu else None,
        free_host_bytes=free_host_bytes(),
        corpora={corpus.address: _fingerprint(corpus) for corpus in _corpora(recipe)},
        sees_run_folder=_sees_run_folder(recipe, processes),
    )


def _attention(recipe: Recipe, layout: Layout, device: torch.device) -> tuple[str, str | None]:
    assert recipe.model is not None
    head_dim = recipe.model.width // recipe.model.heads
    return explain_auto(
        torch.empty(1, 1, 1, head_dim, device=device, dtype=_DTYPES[layout.precision])
    )


def _versions(recipe: Recipe) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    versions |= {package: _version(package) for package in _PACKAGES}
    adam, norm = recipe.optimizer.implementation, recipe.training.norm
    if {adam, norm} & {"auto", "apex"}:
        # PyPI's package of that name is another one.
        is_there = find_apex("optimizers", "FusedAdam") is not None
        versions["apex"] = _version("apex") if is_there else _MISSING
    return versions


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _MISSING


def free_host_bytes() -> int:
    """Memory that the node can still give, or the container's share of it if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return free
    if limit == "max":
        return free
    # Cached files are counted as used, but are given up when memory is asked for.
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, min(free, int(limit) - used + cached))


def _corpora(recipe: Recipe) -> list[Storage]:
    """Where every corpus that the recipe names lies, once."""
    tasks = recipe.data.tasks.values() if recipe.data else []
    paths = [path for task in tasks for path in task.corpora]
    if recipe.evaluation:
        paths += [path for held_out in recipe.evaluation.corpora.values() for path in held_out]
    # Manifests do not come through the cache: what is wrong with it is told when it is opened.
    unused = ShardCache(DEFAULT_FOLDER, DEFAULT_BYTES)
    return [storage_at(path, unused) for path in dict.fromkeys(paths)]


def _fingerprint(corpus: Storage) -> str | UserError:
    try:
        [manifest] = corpus.read([CORPUS_FILE])
    except UserError as error:
        return error
    return hashlib.sha256(manifest).hexdigest()


def _sees_run_folder(recipe: Recipe, processes: Processes) -> bool:
    """Whether a file that the first process leaves in the run folder, or above, appears here."""
    if recipe.run is None or processes.world_size == 1:
        return True
    places = [recipe.run.absolute(), *recipe.run.absolute().parents]
    depth, token, failure = 0, None, None
    if processes.is_first:
        # The run folder itself may be missing, and must not appear before all is checked.
        depth = next(number for number, place in enumerate(places) if place.exists())
        token = places[depth] / f".megatron_nuwa-{secrets.token_hex(8)}"
        try:
            token.touch(exist_ok=False)
        except OSError as error:
            failure = (
                f"the folder {places[depth]} of the run cannot be written: {error.strerror}; "
                "choose another with run=FOLDER"
            )
    processes.raise_first(failure)
    try:
        depth, name = processes.gather((depth, token.name if token else ""))[0]
        seen = depth < len(places) and _appears(places[depth] / name)
        processes.barrier()
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    # No process goes on while another's token lies there.
    processes.barrier()
    return seen


def _appears(path: Path) -> bool:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _size_problems(layout: Layout, processes: Processes) -> list[str]:
    if layout.world_size == processes.world_size:
        return []
    return [
        f"the layout {layout.name} is for {layout.world_size} processes, but "
        f"{processes.world_size} were started"
    ]


def _first_other(values: Sequence[object]) -> int | None:
    """Index of the first value that is not the first one."""
    return next((number for number, value in enumerate(values) if value != values[0]), None)


def _version_problems(reports: Sequence[ProcessReport]) -> list[str]:
    problems = []
    for package in reports[0].versions:
        versions = [report.versions[package] for report in reports]
        other = _first_other(versions)
        if other is not None:
            problems.append(
                f"{package} is {versions[0]} on {reports[0].place} but {versions[other]} on "
                f"{reports[other].place}: install the same version on all nodes"
            )
    return problems


def _attention_problems(reports: Sequence[ProcessReport]) -> list[str]:
    other = _first_other([report.attention for report in reports])
    if other is None:
        return []
    slow = next(report for report in reports if report.attention_reason)
    return [
        f"nearby attention runs on the backend {reports[0].attention!r} on {reports[0].place} but "
        f"on {reports[other].attention!r} on {reports[other].place}, and all would wait for the "
        f"slower one: on {slow.place}, {slow.attention_reason}"
    ]


def _attention_warnings(reports: Sequence[ProcessReport]) -> list[str]:
    first = reports[0]
    if first.attention_reason is None:
        return []
    return [
        f"nearby attention runs on the backend {first.attention!r}, many times slower than the "
        f"kernels: {first.attention_reason}"
    ]


def _run_folder_problems(reports: Sequence[ProcessReport], recipe: Recipe) -> list[str]:
    return [
        f"the run folder {recipe.run} is not shared: {report.place} does not see what "
        f"{reports[0].place} writes there; choose a folder that all nodes mount with run=FOLDER"
        for report in reports
        if not report.sees_run_folder
    ][:1]


def _corpus_problems(reports: Sequence[ProcessReport]) -> list[str]:
    problems = []
    for corpus in reports[0].corpora:
        fingerprints = [report.corpora[corpus] for report in reports]
        blind = [r for r in reports if isinstance(r.corpora[corpus], UserError)]
        other = _first_other(fingerprints)
        if blind:
            problems.append(
                f"corpus {corpus} has no {CORPUS_FILE} that {blind[0].place} can read: "
                f"{blind[0].corpora[corpus]}"
            )
        elif other is not None:
            problems.append(
                f"corpus {corpus} is another one on {reports[other].place} than on "
                f"{reports[0].place}: copy the same corpus to all nodes, or mount one folder on "
                "them all"
            )
    return problems


def _memory_problems(
    reports: Sequence[ProcessReport], needs_device: int | None, needs_host: int | None
) -> list[str]:
    problems = []
    for report in reports:
        free = report.free_device_bytes
        if needs_device is not None and free is not None and free < needs_device:
            problems.append(
                f"{report.place} has {_gib(free)} free on its {report.device}, but the run needs "
                f"{_gib(needs_device)}: {_MEMORY_ADVICE}"
            )
    nodes: dict[str, list[ProcessReport]] = defaultdict(list)
    for report in reports:
        nodes[report.host].append(report)
    for host, own in nodes.items():
        free_host = min(report.free_host_bytes for report in own)
        if needs_host is not None and free_host < needs_host * len(own):
            problems.append(
                f"{host} has {_gib(free_host)} of memory free, but its {len(own)} processes need "
                f"{_gib(needs_host)} each: {_MEMORY_ADVICE}"
            )
    return problems


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
