"""The loss over a split vocabulary: large logits, and gradients that arrive scaled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.parallel import cross_entropy
from megatron_nuwa.parallel.collectives import TensorGroup
from megatron_nuwa.parallel.cross_entropy import VocabularyParallelCrossEntropy


@pytest.mark.parametrize("size", [1.0, 1000.0])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_large_logits_and_scaled_losses_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, size: float, scale: float
) -> None:
    def alone(x: Tensor, *_: object) -> Tensor:
        return x.clone()

    monkeypatch.setattr(cross_entropy, "all_reduced", alone)
    torch.manual_seed(0)
    logits = (torch.randn(2, 5, 7) * size).requires_grad_()
    target = torch.randint(0, 7, (2, 4))
    loss = VocabularyParallelCrossEntropy(TensorGroup(None, 0, 1))(logits, target)
    # What lies behind the last cell is padding.
    expected = F.cross_entropy(logits[:, :4].flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(each * scale, logits)[0] for each in (loss, expected))
    torch.testing.assert_close(found, wanted)
