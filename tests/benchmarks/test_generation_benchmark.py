"""The benchmark of sampling: it measures the real sampler, and its figures fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import generation
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import Nuwa


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is compared on a CPU")
def test_a_quick_run_compares_batches_and_the_other_sampler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    assert generation.main(["--quick", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [row["batch"] for row in report["ours"]] == [1, 8]
    for row in report["ours"]:
        step_ms = row["step_ms"]
        assert tuple(step_ms) == generation.FRAMES
        mean = sum(step_ms.values()) / 3
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / mean * 1e3)
        spread = max(step_ms.values()) / min(step_ms.values()) - 1
        assert row["spread_over_frames"] == pytest.approx(spread)
    assert report["copy_gigabytes_a_second"] > 0
    shown = capsys.readouterr().out
    theirs = report["nuwa_pytorch"]
    if "reason" in theirs:
        assert "cannot be imported" in theirs["reason"]
        assert "not timed" in shown
        return
    assert len(theirs["step_ms"]) == 5
    assert theirs["tokens_per_second"] > 0
    assert "× nuwa-pytorch's sampler" in shown


def test_weights_read_a_step_are_counted() -> None:
    config = generation._QUICK
    model = Nuwa(config)
    width, layers = config.width, config.decoder_layers
    matrices = layers * (4 + 2 + 8) * width * width
    biases_and_norms = layers * ((4 + 2) * width + (4 + 1) * width + 4 * width)
    head = config.codebook_size * width
    assert generation.weight_bytes(model) == 4 * (matrices + biases_and_norms + head)


def test_cpu_time_of_many_threads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(UserError, match="--clock cpu is for one thread"):
        generation.main(["--quick", "--clock", "cpu", "--output", str(tmp_path / "no.json")])
    assert not list(tmp_path.iterdir())
