"""The encoder's benchmark: every way is timed or says why not, on what a bare GPU node has."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_command_line
from torch._inductor import config as inductor

from benchmarks import encoding
from benchmarks.encoding import Stand, Way, main, ways
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.training.recipe import load_recipe
from preprocessing.encoder import FrameEncoder

WITHOUT = "deepspeed", "mpi4py", "ffmpeg", "imageio_ffmpeg", "av"
CODE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(","), None))
from benchmarks.encoding import main
sys.exit(main())
"""


def test_a_quick_run_needs_no_farm_and_writes_figures(tmp_path: Path) -> None:
    output = tmp_path / "encoding.json"
    done = run_command_line(
        *(sys.executable, "-c", CODE, ",".join(WITHOUT), "--recipe", "launch/recipes/demo.yaml"),
        *("--batch-sizes", "4", "2", "--window", "0.05", "--output", output),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    rows = report["ways"]
    assert [row["way"]["batch"] for row in rows] == [4, 2, 4, 4]
    for row in rows:
        assert row["flops"] == pytest.approx(row["frames_per_second"] * report["flops_a_frame"])
        assert row["flops"] > 0
        # No maker publishes a processor's peak, and a measured one depends on its neighbours.
        assert row["mfu"] is None
        assert row["alike"] == 1 or row["way"]["precision"] == "bfloat16"


def test_ways_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    output = tmp_path / "encoding.json"
    recipe = "launch/recipes/demo.yaml"
    quick = ["--recipe", recipe, "--batch-sizes", "2", "--window", "0.01", "--seconds", "0"]
    assert main([*quick, "--output", str(output)]) == 0
    first, *others = json.loads(output.read_text())["ways"]
    assert first["reason"] is None
    assert {row["reason"] for row in others} == {"the 0 s were used up"}


def test_a_gpu_is_measured_as_the_farm_uses_it_once_it_was_without_a_compiler() -> None:
    eager, plain, first, *others = ways([64, 128], cuda=True, compiled=True)
    assert (eager.compiled, first.compiled) == (False, True)
    for way in (eager, first):
        assert way.channels_last
        assert way.precision == "bfloat16"
        assert not way.free
    assert (plain.compiled, plain.precision, plain.channels_last) == (False, "float32", False)
    assert all(way.compiled for way in others)


@pytest.fixture
def arithmetic() -> Iterator[None]:
    """What the farm's encoder sets for its whole process is as it was afterwards."""
    flags = (
        *((torch.backends.cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (inductor, "deterministic"),
    )
    before = [getattr(module, name) for module, name in flags]
    yield
    for (module, name), value in zip(flags, before, strict=True):
        setattr(module, name, value)


@pytest.mark.usefixtures("arithmetic")
def test_each_way_of_a_gpu_is_as_free_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The farm's determinism is what one of them costs; so all but one at a time must hold."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Vqgan, "to", lambda self, *_, **__: self)
    section = load_recipe(ROOT / "launch/recipes/demo.yaml").vqgan
    assert section is not None
    stand = object.__new__(Stand)
    stand._vqgan, stand._device = Vqgan(section.model), torch.device("cuda")
    seen: dict[str, tuple[bool, bool, bool]] = {}
    for way in ways([64, 128], cuda=True, compiled=True):
        stand._encoder(way)
        cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        flags = (*cudnn, inductor.deterministic)
        assert seen.setdefault(way.free, flags) == flags
    assert seen == {
        "": (True, False, True),
        "cuDNN": (False, True, True),
        "Inductor": (True, False, False),
    }


def test_a_way_that_fails_costs_no_other_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, encoder = tmp_path / "encoding.json", Stand._encoder

    def failing(self: Stand, way: Way) -> FrameEncoder:
        if way.batch == 3:
            raise RuntimeError("no C compiler\nat all")
        return encoder(self, way)

    monkeypatch.setattr(Stand, "_encoder", failing)
    recipe = "launch/recipes/demo.yaml"
    quick = ["--recipe", recipe, "--batch-sizes", "2", "3", "--window", "0.01"]
    assert main([*quick, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["ways"]
    reasons = {row["way"]["batch"]: row["reason"] for row in rows}
    assert reasons == {2: None, 3: "RuntimeError: no C compiler"}


def test_mfu_is_of_the_cards_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "Tesla T4": None}
    for name, expected in names.items():
        monkeypatch.setattr(encoding, "device_name", lambda device, name=name: name)
        peaks = encoding._peaks(torch.device("cuda"))
        assert peaks.get("bfloat16") == expected
