"""The benchmarks' quick runs: real processes, JSON that holds what it promises."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_command_line

from benchmarks import decoding, nearby_attention
from benchmarks.harness import peers as peers_module
from benchmarks.harness.cases import Load, cases
from benchmarks.harness.layouts import GridFirst, HeadsFirst, Layout, Strips, TokensFirst
from benchmarks.harness.peers import all_peers
from benchmarks.harness.timing import CpuClock, time_forward
from megatron_nuwa.decoders import DecodeSettings, decode_clip
from megatron_nuwa.errors import UserError
from megatron_nuwa.grid import Grid
from megatron_nuwa.parallel import accelerator

CPU = torch.device("cpu")


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command_line(
        sys.executable, "-m", "benchmarks.nearby_attention", "--device", "cpu", *arguments
    )


def test_a_quick_run_measures_every_case_and_writes_json(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    peers = ("auto", "reference", "cpu", "sdpa-mask", "sdpa-dense", "gather", "natten")
    done = benchmark("--quick", "--output", output, "--peers", *peers)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["copy_gigabytes_a_second"] > 0
    assert [case["name"] for case in report["cases"]] == [case.name for case in cases(False)]
    for case in report["cases"]:
        rows = {row["peer"]: row for row in case["peers"]}
        assert tuple(rows) == peers
        for name in ("auto", "reference", "sdpa-mask", "sdpa-dense", "gather"):
            row = rows[name]
            times = [row[f"{kind}_ms"] for kind in ("forward", "backward", "forward_backward")]
            assert all(math.isfinite(time) and time > 0 for time in times)
            assert row["peak_forward_backward_bytes"] >= 0
            if row["agrees"] == "everywhere":
                assert row["largest_error"] <= 1e-5
            assert name in done.stdout
        for row in rows.values():
            assert ("reason" in row) != ("forward_ms" in row)
            assert "gives another result" not in row.get("reason", "")
    floors = {case["name"]: case["floor_ms"] for case in report["cases"]}
    assert floors["video-3"]["backward"] == pytest.approx(2 * floors["video-3"]["forward"])


def test_a_wrong_result_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = peers_module.nearby_attention
    monkeypatch.setattr(peers_module, "nearby_attention", lambda *t, **s: attend(*t, **s) * 1.01)
    command = ["--device", "cpu", "--quick", "--cases", "video-3-causal", "--peers", "auto"]
    assert nearby_attention.main(command) == 1
    monkeypatch.undo()
    assert nearby_attention.main(command) == 0


def test_a_misspelt_peer_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    done = benchmark("--quick", "--peers", "flax", "--output", tmp_path / "results.json")
    assert done.returncode == 2
    assert "--peers: there is no 'flax'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_model_step_reports_a_speed_up(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    command = ("-m", "benchmarks.model_step", "--steps", "1", "--output", output)
    done = run_command_line(sys.executable, *command)
    if "cannot run this call" in done.stderr:
        assert done.returncode == 2
        pytest.skip("the fused backend is not built here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "× as fast as reference" in done.stdout
    losses = [row["loss"] for row in json.loads(output.read_text())["backends"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [TokensFirst(), HeadsFirst(), Strips(), GridFirst()],
    ids=lambda layout: type(layout).__name__,
)
@pytest.mark.parametrize("grid", [Grid(6, 6, 3), Grid(21, 21, 1), Grid(3, 20, 2)])
def test_layouts_lose_nothing(layout: Layout, grid: Grid) -> None:
    x = torch.randn(2, grid.cells, 3, 8)
    packed = layout.pack(x, grid)
    assert packed.is_contiguous()
    assert torch.equal(layout.unpack(packed, grid), x)


def test_full_cases_are_the_published_ones() -> None:
    pairs = {case.name: case.pairs for case in cases(False)}
    assert pairs == {
        "video-3-causal": 54_299,
        "video-7-causal": 530_730,
        "video-3": 104_188,
        "video-7": 1_057_050,
        "image-3-causal": 2_081,
        "image-7-causal": 9_333,
        "sketch-3": 37_210,
        "sketch-7": 182_250,
        "text": 339_570,
    }
    case = cases(False)[0]
    forward, backward = Load(8, 20, 64, torch.bfloat16, CPU).bytes_moved(case.geometry)
    tensor = 8 * 4410 * 20 * 64 * 2
    assert (forward, backward) == (4 * tensor, 8 * tensor)


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    size = 1 << 26

    def call() -> None:
        for _ in range(2):
            torch.ones(size, dtype=torch.uint8)
        torch.ones(size // 2, dtype=torch.uint8) + torch.ones(size // 2, dtype=torch.uint8)

    peak = CpuClock().peak_bytes(call)
    if peak is None:
        pytest.skip("this system keeps no resettable high-water mark")
    assert peak == pytest.approx(1.5 * size, rel=0.1)


def test_other_programs_at_work_are_noticed() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("this system tells no processor time")
    spin = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as busy:
        # Long enough for the clock of processor time, which ticks a hundred times a second.
        figures = time_forward(CpuClock(), lambda: time.sleep(0.5), repeats=3)
        busy.kill()
    assert figures["forward_foreign_share"] > 0.2 / (os.cpu_count() or 1)


def test_peers_have_names_of_their_own() -> None:
    for kind in ("cpu", "cuda"):
        names = [peer.name for peer in all_peers(torch.device(kind))]
        assert names[0] == "auto"
        assert len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the kernels where there is a GPU")
@pytest.mark.parametrize("name", ["benchmarks.nearby_kernels", "benchmarks.kernel_layouts"])
def test_times_of_kernels_need_a_gpu_and_say_so(tmp_path: Path, name: str) -> None:
    done = run_command_line(sys.executable, "-m", name, "--output", tmp_path / "no.json")
    assert done.returncode == 2
    assert f"{name} needs a GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
@pytest.mark.parametrize(
    "name", ["encoding", "generation", "model_step", "nearby_attention", "step_parts"]
)
def test_a_gpu_that_does_not_work_is_not_measured_as_a_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(accelerator, "_NVIDIA_DRIVER", tmp_path)
    with pytest.raises(UserError, match=r"an NVIDIA driver is here .* but CUDA does not work"):
        importlib.import_module(f"benchmarks.{name}").main([])


def test_decoding_is_held_against_the_same_pixels_of_bare_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = decoding.demo_videos()[-1]
    monkeypatch.setattr(decoding, "demo_videos", lambda: [video])
    quick = ["--rounds", "1", "--image-size", "32", "--frames", "2"]
    output = tmp_path / "decoding.json"
    assert decoding.main([*quick, "--limit", "100", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert set(report["ratios"]) >= {decoding.BARE, decoding.PLAIN, decoding.PROJECT}
    assert decoding.main([*quick, "--limit", "0"]) == 1
    settings = DecodeSettings(image_size=32, frames=2, short_clips="pad")
    frames, _ = decode_clip(video, settings)
    assert np.array_equal(decoding.bare_ffmpeg(video, settings, decoding.EXACT), frames)
