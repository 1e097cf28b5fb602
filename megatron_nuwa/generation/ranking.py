"""The best of many samples: pictures and clips ranked by how well CLIP says they fit their text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import why_unreadable
from megatron_nuwa.generation.tasks import Sample

_PICTURES_AT_ONCE = 32


class Ranker(Protocol):
    """Anything that can say how well samples fit their texts."""

    def scores(self, pixels: np.ndarray, prompts: Sequence[str]) -> Sequence[float]:
        """A number a sample, the higher the better.

        `pixels` uint8 (samples, frames, rows, columns, 3); one prompt a sample.
        """
        ...


class Ranked(NamedTuple):
    """A sample's number and its score."""

    sample: int
    score: float


def best_of(pixels: np.ndarray, prompts: Sequence[str], count: int, ranker: Ranker) -> list[Ranked]:
    """The `count` best samples of every prompt, the best first, prompts in order of appearance.

    `pixels` uint8 (samples, frames, rows, columns, 3); samples with equal prompts compete. Equal
    scores keep the samples' order. Raises `ValueError` where a prompt has fewer samples, and
    `UserError` where CLIP's weights give no numbers.
    """
    if len(pixels) != len(prompts):
        raise ValueError(f"prompts must be one a sample: {len(pixels)}, not {len(prompts)}")
    if count < 1:
        raise ValueError(f"count must be 1 or more, not {count}")
    groups: dict[str, list[Ranked]] = defaultdict(list)
    scores = ranker.scores(pixels, prompts)
    for sample, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
        if math.isnan(score):
            raise UserError(
                f"CLIP gives sample {sample} no score (NaN): the file of --clip-weights is damaged"
            )
        groups[prompt].append(Ranked(sample, float(score)))
    for prompt, group in groups.items():
        if len(group) < count:
            raise ValueError(f"count {count} is more than the {len(group)} samples of {prompt!r}")
    return [
        ranked
        for group in groups.values()
        for ranked in sorted(group, key=lambda ranked: -ranked.score)[:count]
    ]


def best_samples(
    samples: Sequence[Sample], drawn: int, count: int, ranker: Ranker, name: str
) -> list[Sample]:
    """The `count` best of every `drawn` samples that began alike, the best first.

    Their origins say how many they were, the ranker's `name` and the score.
    """
    kept = []
    for first in range(0, len(samples), drawn):
        group = samples[first : first + drawn]
        pixels = np.stack([each.frames for each in group])
        prompts = [each.request.prompt for each in group]
        for number, score in best_of(pixels, prompts, count, ranker):
            ranked = {"best_of": drawn, "clip": name, "clip_score": round(score, 6)}
            kept.append(replace(group[number], origin=group[number].origin | ranked))
    return kept


class ClipRanker:
    """CLIP (Radford et al., arXiv 2103.00020): the cosine of picture and text, mean over frames."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """An open_clip model in evaluation mode, and its tokenizer."""
        self._model, self._tokenizer = model, tokenizer
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        size = model.visual.image_size
        self._size = (size, size) if isinstance(size, int) else tuple(size)
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(3, 1, 1)
            for values in (model.visual.image_mean, model.visual.image_std)
        )

    @classmethod
    def load(
        cls, weights: Path, architecture: str = "ViT-B-32", device: torch.device | None = None
    ) -> ClipRanker:
        """A ranker of open_clip's `architecture` with weights from a file; downloads nothing.

        `weights` is a .safetensors file, or a file that `torch.load(weights_only=True)` reads. It
        does not tell its activation: OpenAI's weights fit `ViT-B-32`, too, but are meant for
        `ViT-B-32-quickgelu`. Raises `UserError` that names the file, the architecture or the
        missing package.
        """
        state = _read_weights(weights)
        open_clip = _import_open_clip()
        known = open_clip.list_models()
        if architecture not in known:
            raise UserError(
                f"CLIP architecture {architecture!r} is not one of open_clip's {len(known)}, such "
                "as ViT-B-32, ViT-L-14 and ViT-H-14, or ViT-B-32-quickgelu and ViT-L-14-quickgelu "
                "for OpenAI's weights"
            )
        text = open_clip.get_model_config(architecture).get("text_cfg", {})
        if "hf_model_name" in text or "hf_tokenizer_name" in text:
            raise UserError(
                f"CLIP architecture {architecture!r} reads its text through files of the Hugging "
                "Face hub; take one with CLIP's own text model, such as ViT-B-32"
            )
        model = open_clip.create_model(
            architecture,
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
            device=device or torch.device("cpu"),
        )
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"the CLIP weights {weights} do not fit architecture {architecture}: {reason}"
            ) from error
        return cls(model.eval(), open_clip.get_tokenizer(architecture))

    @torch.no_grad()
    def scores(self, pixels: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """Cosines in [-1, 1], one a sample; see `Ranker`."""
        samples, frames = pixels.shape[:2]
        texts = F.normalize(self._model.encode_text(self._tokenize(prompts)).float(), dim=-1)
        pictures = torch.from_numpy(pixels).flatten(0, 1)
        vectors = torch.cat(
            [
                self._model.encode_image(self._prepared(part)).float()
                for part in pictures.split(_PICTURES_AT_ONCE)
            ]
        )
        vectors = F.normalize(vectors, dim=-1).view(samples, frames, -1)
        cosines: list[float] = (vectors * texts.unsqueeze(1)).sum(-1).mean(1).tolist()
        return cosines

    def _tokenize(self, prompts: Sequence[str]) -> Tensor:
        tokens: Tensor = self._tokenizer(list(prompts))
        return tokens.to(self._device)

    def _prepared(self, pictures: Tensor) -> Tensor:
        """uint8 (n, rows, columns, 3) → CLIP's input: bicubic resize, its own mean and spread.

        A picture that is not square is squeezed, so that nothing of it is cut off.
        """
        x = pictures.to(self._device).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        return ((x - self._mean) / self._std).to(self._dtype)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no file of CLIP weights {path}")
    if (reason := why_unreadable(path)) is not None:
        raise UserError(f"the CLIP weights {path} cannot be read: {reason}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path} holds no CLIP weights that can be read safely") from error
    except Exception as error:
        # torch raises pickle.UnpicklingError for anything but plain tensors.
        raise UserError(
            f"{path} holds more than plain tensors, and nothing in it is run: save its state_dict "
            "as .safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} holds no state_dict of CLIP weights")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f'ranking by CLIP needs open_clip (pip install "megatron-nuwa[clip]"): {error}'
        ) from error
    except RuntimeError as error:
        # torchvision built for another torch fails like this.
        raise UserError(f"open_clip cannot be imported here: {error}") from error
    return open_clip
