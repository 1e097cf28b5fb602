"""Tokens of one kind of GPU: what secures them, and what is said where there are two kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents

from megatron_nuwa.parallel import accelerator
from preprocessing import encoder
from preprocessing.__main__ import main
from preprocessing.encoder import EncoderSettings, engine

ON_A_GPU = EncoderSettings(device="cuda", precision="bfloat16", compiled=True)


class StandIn:
    """A module that says where it was put."""

    def __init__(self) -> None:
        self.device: Any = None

    def to(self, device: Any = None, memory_format: Any = None) -> StandIn:
        self.device = device or self.device
        return self


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a driver that CUDA does not work with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accelerator, "_NVIDIA_DRIVER", tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.fixture
def flags() -> Iterator[None]:
    """What is set for the whole process is taken back."""
    changed: list[tuple[Any, str, bool]] = [
        (torch.backends.cudnn, "deterministic", False),
        (torch.backends.cudnn, "benchmark", True),
        (torch.backends.cudnn, "allow_tf32", True),
        (torch.backends.cuda.matmul, "allow_tf32", True),
        (torch._inductor.config, "deterministic", False),
    ]
    before = [getattr(module, name) for module, name, _ in changed]
    threads = torch.get_num_threads()
    for module, name, value in changed:
        setattr(module, name, value)
    yield
    for (module, name, _), value in zip(changed, before, strict=True):
        setattr(module, name, value)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("flags")
def test_encoder_on_a_gpu_has_one_thread_and_times_no_kernels_against_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    vqgan: Any = StandIn()
    torch.set_num_threads(3)
    assert encoder._placed(vqgan, ON_A_GPU, 5, torch.channels_last) is vqgan
    # The cores are for the decode ranks.
    assert torch.get_num_threads() == 1
    assert chosen == [vqgan.device] == [torch.device("cuda", 5)]
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert torch._inductor.config.deterministic


@pytest.mark.usefixtures("flags")
def test_inductor_without_a_deterministic_mode_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = SimpleNamespace()
    monkeypatch.setattr(torch._inductor, "config", older)
    encoder.make_arithmetic_the_same()
    assert not vars(older)


def test_engine_names_the_gpu_the_versions_and_what_changes_its_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"NVIDIA H100 number {gpu}")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    for name in [name for name in os.environ if name.startswith("TORCHINDUCTOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    plain = f"NVIDIA H100 number 3, PyTorch {torch.__version__}, cuDNN 91002"
    assert engine(ON_A_GPU, 3) == plain
    # Ranks may have a cache each.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/rank3")
    assert engine(ON_A_GPU, 3) == plain
    monkeypatch.setenv("TORCHINDUCTOR_USE_FAST_MATH", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert engine(ON_A_GPU, 3) == f"{plain}, NVIDIA_TF32_OVERRIDE=1, TORCHINDUCTOR_USE_FAST_MATH=1"
    not_compiled = ON_A_GPU.model_copy(update={"compiled": False})
    assert engine(not_compiled, 3) == f"{plain}, NVIDIA_TF32_OVERRIDE=1"


def test_the_cpu_keeps_its_name_whatever_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora that were begun before have noted it."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    capability = torch.backends.cpu.get_cpu_capability()
    expected = f"CPU ({capability}), PyTorch {torch.__version__}"
    assert engine(EncoderSettings.chosen("cpu"), 0) == expected


@pytest.mark.usefixtures("old_driver")
@pytest.mark.parametrize("command", ["tokenize", "shots"])
def test_no_command_of_the_farm_falls_back_to_the_cpu(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    rows: list[dict[str, object]] = [{"id": 0, "media": "image0.png", "captions": CAPTIONS}]
    manifest = write_manifest(media / "driver.jsonl", rows)
    output = tmp_path / "made/shots.jsonl"
    asked = ["shots", str(manifest), "--output", str(output)]
    if command == "tokenize":
        asked = tokenize_command(manifest, output, tools)
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert f"an NVIDIA driver is here ({tmp_path}), but CUDA does not work: " in told
    assert "set DS_ACCELERATOR=cpu to compute on the CPU" in told
    assert not output.parent.exists()


@pytest.mark.usefixtures("old_driver")
def test_the_cpu_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_cpu = EncoderSettings(device="cpu", precision="float32", compiled=False)
    assert EncoderSettings.chosen("cpu") == on_the_cpu
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert EncoderSettings.chosen() == on_the_cpu
    # It says what "auto" means, as in training, also where CUDA works.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert EncoderSettings.chosen() == on_the_cpu
    assert EncoderSettings.chosen("cuda") == ON_A_GPU


def test_corpus_completed_with_another_gpu_is_warned_of_and_keeps_its_form(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"image{n}.png", "captions": CAPTIONS} for n in range(6)
    ]
    manifest = write_manifest(media / "engines.jsonl", rows)
    output = tmp_path / "corpus"
    command = tokenize_command(manifest, output, tools, "--items-per-shard", "3", "--report")
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().out
    whole = contents(output)
    farm = tmp_path / "corpus.farm"
    here = json.loads((farm / "engines.json").read_text())
    assert here == [engine(EncoderSettings.chosen("cpu"), 0)]
    assert here[0] in (farm / "report.html").read_text()

    (farm / "engines.json").write_text('["NVIDIA A100, PyTorch 2.11.0"]')
    (output / "shard-000001.json").unlink()
    assert main(command) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(told) == 1
    assert f"encoded with {here[0]} and with NVIDIA A100, PyTorch 2.11.0, so some" in told[0]
    assert contents(output) == whole
    assert "and with NVIDIA A100" in (farm / "report.html").read_text()
