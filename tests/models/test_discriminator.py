"""The adversarial losses and the weight that balances them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_nuwa.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_exactly_its_patch(layers: int, patch: int) -> None:
    torch.manual_seed(0)
    # Without normalisation, which looks at the whole image.
    network = PatchDiscriminator(8, layers).double()
    for place, module in enumerate(network.blocks):
        if isinstance(module, nn.GroupNorm):
            network.blocks[place] = nn.Identity()
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(images)
    middle = logits.shape[2] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows = gradient[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_losses_are_the_paper_s() -> None:
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([1.5, -0.4])
    believed_real, believed_fake = torch.sigmoid(real), torch.sigmoid(fake)
    paper = -(believed_real.log().mean() + (1 - believed_fake).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake, "log"), paper)
    torch.testing.assert_close(generator_loss(fake, "log"), (1 - believed_fake).log().mean())
    torch.testing.assert_close(
        generator_loss(fake, "log_non_saturating"), -believed_fake.log().mean()
    )
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(
        0.5 * ((0.7 + 3.0) / 2 + (2.5 + 0.6) / 2)
    )
    assert generator_loss(fake, "hinge").item() == pytest.approx(-0.55)


def test_adaptive_weight_equals_the_ratio_of_gradient_norms_by_hand() -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1).double()
    hidden = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    target = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        out = last(hidden)
        return (out - target).square().mean(), out.sigmoid().log().mean()

    norms = []
    for place in range(2):
        last.zero_grad()
        losses()[place].backward()
        assert last.weight.grad is not None
        norms.append(float(last.weight.grad.square().sum().sqrt()))
    found = adaptive_weight(*losses(), last.weight, maximum=1e4)
    assert float(found) == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-9)
    assert not found.requires_grad
    assert float(adaptive_weight(*losses(), last.weight, maximum=0.01)) == 0.01
