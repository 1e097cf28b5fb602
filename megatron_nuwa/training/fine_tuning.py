"""Starting a run from trained weights: other corpora, tasks and grids, some weights frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig
from megatron_nuwa.models.vqgan import fingerprint
from megatron_nuwa.training.inputs import Inputs
from megatron_nuwa.training.name_patterns import matching
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.trained_model import TrainedModel, locate, open_located

# What no weight's shape shows, but what the weights were trained for.
_FIXED_FIELDS = (
    "width",
    "heads",
    "encoder_layers",
    "decoder_layers",
    "feed_forward_ratio",
    "norm",
    "cross_attention",
    "visual_embedding",
    "tie_head",
    "text_tokens",
)
_FIELD = "start.weights"
_POSITIONS = ("context_positions.", "target_positions.")
# Weights that mean nothing with another tokenizer, as far as the model has them.
_OF_VQGAN = ("visual_embedding.codes.weight", "head.weight")
_OF_BPE = ("text_embedding.weight",)
_OF_SKETCH_VQGAN = ("sketch_embedding.codes.weight",)
# Weights that only models have that read sketches.
_OF_SKETCHES = "sketch_embedding."


def find_source(recipe: Recipe) -> Path | UserError | None:
    """Where the weights lie that a new run begins with; checks all of their bytes.

    Returns the `UserError` for a place that has none, so that one process can look for all.
    """
    if recipe.start is None:
        return None
    try:
        return locate(recipe.start.weights, _FIELD)
    except UserError as error:
        return error


def fit(source: Path | UserError | None, recipe: Recipe, inputs: Inputs) -> StartWeights | None:
    """The weights that `find_source` found; raises its error, or `UserError` if they do not fit."""
    if isinstance(source, UserError):
        raise source
    if source is None:
        return None
    assert recipe.start is not None
    assert recipe.model is not None
    trained = open_located(source, _FIELD)
    others = []
    if fingerprint(trained.vqgan()) != fingerprint(inputs.vqgan):
        others.append("vqgan")
    if trained.bpe().fingerprint != inputs.bpe.fingerprint:
        others.append("bpe")
    theirs, ours = trained.sketch_vqgan(), inputs.sketch_vqgan
    if theirs is not None and ours is not None and fingerprint(theirs) != fingerprint(ours):
        others.append("sketch_vqgan")
    return StartWeights(trained, recipe.model, recipe.start.fresh, others)


class StartWeights:
    """The weights of a trained model, fitted to the model of a recipe."""

    def __init__(
        self,
        trained: TrainedModel,
        config: NuwaConfig,
        fresh: Sequence[str],
        other_tokenizers: Sequence[str] = (),
    ) -> None:
        """`other_tokenizers` names those of the recipe's tokenizers that `trained` has others of.

        The embedding of sketches begins anew where `trained` reads none.

        Raises `UserError` naming the first field, pattern or weight that does not fit.
        """
        self._trained = trained
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Nuwa(config).named_parameters()}
        self._fresh = matching(fresh, shapes, "start.fresh")
        with torch.device("meta"):
            theirs = {name: p.shape for name, p in Nuwa(trained.facts.model).named_parameters()}
        self._new = {
            name
            for name in shapes
            if name.startswith(_OF_SKETCHES) and name not in theirs and name not in self._fresh
        }
        self._left = {name for name in theirs if name.startswith(_OF_SKETCHES)} - shapes.keys()
        self._shapes = {
            name: shapes[name] for name in shapes if name not in self._fresh | self._new
        }
        self._check_fields(config)
        self._check_tokenizers(other_tokenizers)
        self._resized = {}
        for name, shape in self._shapes.items():
            if name.startswith(_POSITIONS) and theirs[name] != shape:
                self._resized[name] = (theirs[name][0], shape[0])
            elif theirs[name] != shape:
                raise UserError(
                    f"start.weights: {name} is {tuple(theirs[name])} in {trained.origin}, but the "
                    f"recipe's model needs {tuple(shape)}; change the model, or let it begin anew "
                    f"with start.fresh=[{name}]"
                )

    def of(self, name: str) -> Tensor | None:
        """A whole starting weight, fp32; None for one that begins anew."""
        if name not in self._shapes:
            return None
        weight = self._trained.weight(name).float()
        return resized(weight, self._shapes[name][0]) if name in self._resized else weight

    def summary(self) -> str:
        """One line that says what is taken, resized and left."""
        origin, step = self._trained.origin, self._trained.facts.step
        parts = [f"{len(self._shapes)} weights of {origin}, trained for {step} steps"]
        parts += [f"{name} from {old} to {new}" for name, (old, new) in self._resized.items()]
        parts += [f"{len(self._fresh)} weights begin anew"] if self._fresh else []
        if self._new:
            parts.append("it reads no sketches, so their embedding begins anew")
        if self._left:
            parts.append("its embedding of sketches is left behind")
        return "starting from " + "; ".join(parts)

    def _check_fields(self, config: NuwaConfig) -> None:
        theirs = self._trained.facts.model
        for field in _FIXED_FIELDS:
            before, now = getattr(theirs, field), getattr(config, field)
            if before != now:
                raise UserError(
                    f"start.weights: {self._trained.origin} was trained with model.{field} = "
                    f"{before}, but the recipe says {now}; set it to {before}"
                )

    def _check_tokenizers(self, others: Sequence[str]) -> None:
        for kind, title, names in (
            ("vqgan", "VQ-GAN", _OF_VQGAN),
            ("bpe", "BPE", _OF_BPE),
            ("sketch_vqgan", "VQ-GAN-Seg", _OF_SKETCH_VQGAN),
        ):
            kept = [name for name in names if name in self._shapes]
            if kind in others and kept:
                raise UserError(
                    f"start.weights: {self._trained.origin} was trained with another {title} than "
                    f"tokenizers.{kind}, so its {' and '.join(kept)} mean nothing here; tokenize "
                    f"with its {title}, or let them begin anew with "
                    f"start.fresh=[{', '.join(kept)}]"
                )


def resized(positions: Tensor, length: int) -> Tensor:
    """Learned positions (n, width) of one axis, interpolated linearly to (length, width).

    Cells are seen as equal parts of the axis: the middle of each new one is looked up.
    """
    line = positions.T.unsqueeze(0)
    return F.interpolate(line, size=length, mode="linear", align_corners=False)[0].T.contiguous()
