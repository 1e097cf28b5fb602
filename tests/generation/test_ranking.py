"""The best of many samples: the order of any ranker, and open_clip with weights from a file."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.ranking import ClipRanker, best_of

_TORCHVISION = ("transforms", "transforms.functional", "ops", "ops.misc")


class Brightness:
    """A ranker that likes light pictures."""

    def scores(self, pixels: np.ndarray, prompts: Sequence[str]) -> list[float]:
        return [float(sample.mean()) for sample in pixels]


def samples(*levels: int) -> np.ndarray:
    return np.stack([np.full((2, 8, 8, 3), level, dtype=np.uint8) for level in levels])


def test_the_best_samples_of_each_prompt_come_first() -> None:
    prompts = ["a", "b", "a", "b", "a"]
    best = best_of(samples(10, 50, 30, 40, 20), prompts, 2, Brightness())
    assert [ranked.sample for ranked in best] == [2, 4, 1, 3]
    assert [ranked.score for ranked in best] == [30, 20, 50, 40]
    equal = best_of(samples(7, 7, 7), ["a"] * 3, 3, Brightness())
    assert [ranked.sample for ranked in equal] == [0, 1, 2]


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts must be one a sample"):
        best_of(samples(1, 2), ["a"], 1, Brightness())
    with pytest.raises(ValueError, match="count must be 1 or more"):
        best_of(samples(1), ["a"], 0, Brightness())
    with pytest.raises(ValueError, match="count 2 is more than the 1 samples of 'b'"):
        best_of(samples(1, 2, 3), ["a", "a", "b"], 2, Brightness())
    broken = MagicMock()
    broken.scores.return_value = [float("nan")]
    with pytest.raises(UserError, match=r"sample 0 no score .* the file of --clip-weights is dam"):
        best_of(samples(1), ["a"], 1, broken)


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The real package, with a tiny architecture; torchvision is only in its way."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        # It does not fit every torch, and neither networks nor tokenizers use it.
        monkeypatch.setitem(sys.modules, "torchvision", MagicMock())
        for name in _TORCHVISION:
            monkeypatch.setitem(sys.modules, f"torchvision.{name}", MagicMock())
    import open_clip as package

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    for name, changes in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | changes))
        package.add_model_config(tmp_path / f"{name}.json")
    return package


@pytest.fixture
def model(open_clip: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    made: torch.nn.Module = open_clip.create_model("tiny", load_weights=False).eval()
    return made


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".nested.pt"])
@torch.no_grad()
def test_scores_are_cosines_of_open_clips_own_vectors(
    open_clip: Any, model: Any, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".pt":
        torch.save(state, path)
    else:
        torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, path)
    ranker = ClipRanker.load(path, "tiny")
    # Of CLIP's own size, so that no resize blurs the comparison.
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)
    prompts = ["a red square", "a blue circle moves", "a red square"]
    scores = ranker.scores(pixels, prompts)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std)
    )
    x = (torch.from_numpy(pixels).permute(0, 1, 4, 2, 3) / 255 - mean) / std
    texts = model.encode_text(open_clip.get_tokenizer("tiny")(prompts))
    for sample in range(3):
        vectors = model.encode_image(x[sample])
        cosine = torch.cosine_similarity(vectors, texts[sample : sample + 1]).mean()
        assert scores[sample] == pytest.approx(float(cosine), abs=1e-4)
    best = best_of(pixels, prompts, 1, ranker)
    assert best[0].sample == max((0, 2), key=lambda number: scores[number])
    assert ClipRanker.load(path, "tiny").scores(np.zeros((1, 1, 21, 13, 3), np.uint8), ["x"])


def test_the_same_weights_are_another_network_with_another_activation(
    model: Any,
    command: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No error can tell which one OpenAI's weights are meant for, and so the help does."""
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3), dtype=np.uint8)
    plain, quick = (
        ClipRanker.load(tmp_path / "weights.pt", name).scores(pixels, ["a red square"])
        for name in ("tiny", "tiny-quickgelu")
    )
    assert plain[0] != pytest.approx(quick[0], abs=1e-5)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    with pytest.raises(SystemExit):
        command.parse_arguments()
    assert "ViT-B-32-quickgelu" in capsys.readouterr().out


def test_bad_weights_are_one_sentence(open_clip: Any, model: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    torn, code = tmp_path / "torn.safetensors", tmp_path / "code.pt"
    torn.write_bytes(b"no")
    torch.save(model, code)
    listed = tmp_path / "listed.pt"
    torch.save([1], listed)
    for path, architecture, message in (
        (tmp_path / "gone.pt", "tiny", "there is no file of CLIP weights .*gone.pt"),
        (torn, "tiny", "torn.safetensors holds no CLIP weights"),
        (code, "tiny", "code.pt holds more than plain tensors"),
        (listed, "tiny", "listed.pt holds no state_dict"),
        (other, "tiny", "other.safetensors do not fit architecture tiny"),
        (other, "ViT-Z", "'ViT-Z' is not one of open_clip's .*-quickgelu for OpenAI's weights"),
        (other, "roberta-ViT-B-32", "Hugging Face hub"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ClipRanker.load(path, architecture)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "open_clip":
            raise ImportError("No module named 'open_clip'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"needs open_clip \(pip install .*\[clip\]"):
        ClipRanker.load(path)
