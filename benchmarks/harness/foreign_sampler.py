"""nuwa-pytorch's sampler, one of its steps at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness.foreign import import_nuwa_pytorch
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import NuwaConfig

# What `NUWA.generate` takes when nothing else is asked for.
_FILTER_THRESHOLD = 0.9
_FRAME_PIXELS, _HALVINGS = 16, 4


class _NoPixels(nn.Module):
    """Stands for the VQ-GAN, of which a step only needs the sizes."""

    def __init__(self, side: int, codes: int) -> None:
        super().__init__()
        self.image_size, self.num_layers, self.codebook_size = (
            side * _FRAME_PIXELS,
            _HALVINGS,
            codes,
        )

    def copy_for_eval(self) -> _NoPixels:
        return self


class ForeignSampler:
    """Steps of `NUWA.generate` without guidance, for a model of the same size as ours.

    Its step runs the decoder over everything made so far. The loop's body stands here, because
    the package can only begin at the first token and goes on for hours; attention, layers, logits
    and drawing are its own. `UnavailableError` where it is not installed.
    """

    def __init__(self, config: NuwaConfig, grid: Grid, batch: int) -> None:
        self._package = import_nuwa_pytorch()
        head_dim = config.width // config.heads
        self._model = self._package.NUWA(
            dim=config.width,
            vae=_NoPixels(grid.h, config.codebook_size),
            max_video_frames=grid.s,
            text_num_tokens=config.text_vocabulary,
            text_max_seq_len=config.text_tokens,
            text_enc_depth=config.encoder_layers,
            text_enc_heads=config.heads,
            text_enc_dim_head=head_dim,
            # Its other text encoder fails on an argument (0.7.8).
            enc_reversible=True,
            dec_depth=config.decoder_layers,
            dec_heads=config.heads,
            dec_dim_head=head_dim,
        ).eval()
        self._codes, self._batch = config.codebook_size, batch
        text = torch.randint(1, config.text_vocabulary, (batch, config.text_tokens))
        self._mask = text != 0
        with torch.no_grad():
            self._text = self._model.embed_text(text, mask=self._mask)
            self._positions = self._model.video_pos_emb()

    @property
    def decoder_parameters(self) -> int:
        """Weights of the decoder's layers."""
        return sum(weight.numel() for weight in self._model.video_transformer.parameters())

    @torch.no_grad()
    def step(self, made: int) -> Tensor:
        """The token (batch,) after `made` tokens."""
        model, package = self._model, self._package
        tokens = torch.randint(0, self._codes, (self._batch, made))
        x = self._positions[:made] + model.image_embedding(tokens)
        x = torch.cat([model.video_bos.expand(self._batch, 1, -1), x], dim=1)
        x = model.video_transformer(x, context=self._text, context_mask=self._mask)
        logits = package.top_k(model.to_logits(x)[:, -1, :], thres=_FILTER_THRESHOLD)
        drawn: Tensor = package.gumbel_sample(logits, temperature=1.0, dim=-1)
        return drawn
