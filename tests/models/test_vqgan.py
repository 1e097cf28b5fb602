"""The VQ-GAN: shapes, files, fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_nuwa.config import parse_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.models import autoencoder
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, fingerprint, load_vqgan, save_vqgan


def small(**changes: object) -> Vqgan:
    torch.manual_seed(0)
    settings = {"image_size": 32, "downsampling": 8, "base_channels": 8, "codebook_size": 24}
    settings |= {"code_dim": 12, "lookup_dim": 4, "residual_blocks": 1}
    return Vqgan(VqganConfig(**(settings | changes))).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("downsampling", [4, 8, 16])
@torch.no_grad()
def test_images_become_tokens_and_images_again(downsampling: int, patch_size: int) -> None:
    model = small(downsampling=downsampling, patch_size=patch_size)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, 32 // downsampling, 32 // downsampling)
    assert model.grid_side == 32 // downsampling
    assert tokens.dtype == torch.int64
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, model(images).reconstruction.clamp(-1, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_the_program_compiled_for_gpus_gives_the_features_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, patch_size: int, layout: torch.memory_format
) -> None:
    encoder = small(patch_size=patch_size).encoder
    images = (torch.rand(2, 3, 32, 48) * 2 - 1).contiguous(memory_format=layout)
    expected = encoder(images)
    traced = []

    def is_compiled(tensor: torch.Tensor) -> bool:
        traced.append(tensor.shape)
        return True

    monkeypatch.setattr(autoencoder, "is_compiled_for_gpus", is_compiled)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
    assert traced
    monkeypatch.setattr(autoencoder, "is_compiled_for_gpus", lambda tensor: True)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_by_rows_is_group_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 24, 10, 14, generator=generator) * 3 + 5
    hidden = hidden.to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 24, generator=generator)
    found = autoencoder.group_norm_by_rows(hidden, 8, weight, bias, 1e-6)
    expected = torch.nn.functional.group_norm(hidden.double(), 8, weight.double(), bias.double())
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=1e-4 if dtype == torch.float32 else 1e-2,
        atol=1e-4 if dtype == torch.float32 else 1e-2,
    )


@torch.no_grad()
def test_decoding_starts_from_the_codebook() -> None:
    model = small()
    tokens = torch.arange(16).view(1, 4, 4)
    codes = model.codebook()[tokens].movedim(-1, 1)
    assert model.codebook().shape == (24, 12)
    torch.testing.assert_close(model.decode(tokens), model.decoder(codes).clamp(-1, 1))


@torch.no_grad()
def test_other_image_sizes_keep_the_factor() -> None:
    assert small().encode(torch.zeros(1, 3, 64, 40)).shape == (1, 8, 5)


def test_paper_size_has_12288_codes_of_256_and_a_grid_of_21() -> None:
    with torch.device("meta"):
        model = Vqgan(VqganConfig(lookup_dim=None, normalise_codes=False))
    assert model.quantizer.table.shape == (12288, 256)
    assert model.grid_side == 21


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 30, 32), torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32)]
)
def test_wrong_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="images must have shape"):
        small().encode(images)


def test_wrong_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must lie in 0 … 23, not 0 … 24"):
        small().decode(torch.tensor([[[0, 24]]]))
    with pytest.raises(ValueError, match="tokens must have shape"):
        small().decode(torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_size": 337}, "image_size 337 must be a multiple of downsampling 16"),
        ({"channel_multipliers": [1, 2]}, "channel_multipliers must have 5 numbers"),
        ({"code_dimm": 8}, "unknown key 'code_dimm'; did you mean 'code_dim'?"),
        ({"gradient": "none"}, "gradient must be 'straight_through' or 'rotation', not 'none'"),
        ({"classes": 1}, "classes must be at least 2, not 1"),
        ({"attention_factors": [32]}, "attention_factors must be among 1, 2, 4, 8, 16, not 32"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_settings(VqganConfig, change, "recipe r.yaml")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("recipe r.yaml: ")


@torch.no_grad()
def test_saved_model_loads_equal_from_file_and_from_run_folder(tmp_path: Path) -> None:
    model = small()
    save_vqgan(model, tmp_path / "run" / "vqgan.safetensors")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["vqgan.safetensors"]
    for path in (tmp_path / "run", tmp_path / "run" / "vqgan.safetensors"):
        loaded = load_vqgan(path)
        assert not loaded.training
        assert loaded.config == model.config
        assert fingerprint(loaded) == fingerprint(model)
        images = torch.rand(1, 3, 32, 32) * 2 - 1
        assert torch.equal(loaded.decode(loaded.encode(images)), model.decode(model.encode(images)))


def test_fingerprint_sees_one_weight_and_the_settings_but_not_the_layout_in_memory() -> None:
    model = small()
    before = fingerprint(model)
    assert fingerprint(small()) == before
    assert fingerprint(small().to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.decoder.conv_out.bias[1] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(small(gradient="straight_through")) != before


def test_settings_that_came_later_leave_earlier_descriptions_as_they_were() -> None:
    """Corpora name the fingerprint of their VQ-GAN, which holds this text."""
    assert VqganConfig().description() == (
        '{"image_size":336,"downsampling":16,"base_channels":128,"channel_multipliers":[],'
        '"residual_blocks":2,"attention":true,"patch_size":1,"codebook_size":12288,'
        '"code_dim":256,"lookup_dim":8,"normalise_codes":true,"gradient":"rotation"}'
    )
    assert '"classes":5' in VqganConfig(classes=5).description()
    assert fingerprint(small(classes=5)) != fingerprint(small(classes=6))


@torch.no_grad()
def test_attention_stands_after_every_residual_block_of_the_named_resolutions() -> None:
    model = small(attention=False, attention_factors=[4], residual_blocks=2)
    for half, blocks in ((model.encoder, 2), (model.decoder, 3)):
        kinds = [type(module).__name__ for module in half.levels]
        assert kinds.count("SpatialAttention") == blocks
        for place, kind in enumerate(kinds):
            assert kind != "SpatialAttention" or kinds[place - 1] == "ResidualBlock"
    side = {module: 0 for module in model.modules() if type(module).__name__ == "SpatialAttention"}
    for module in side:
        module.register_forward_hook(lambda m, i, o: side.update({m: o.shape[-1]}))
    model(torch.zeros(1, 3, 32, 32))
    assert set(side.values()) == {8}


@torch.no_grad()
def test_segmentation_encodes_one_hot_maps_and_decodes_logits(tmp_path: Path) -> None:
    model = small(classes=5)
    maps = one_hot(torch.randint(0, 5, (2, 32, 32)), 5)
    tokens = model.encode(maps)
    logits = model.decode(tokens)
    assert tokens.shape == (2, 4, 4)
    assert logits.shape == (2, 5, 32, 32)
    torch.testing.assert_close(logits, model(maps).reconstruction)
    save_vqgan(model, tmp_path / "seg.safetensors")
    assert torch.equal(load_vqgan(tmp_path / "seg.safetensors").decode(tokens), logits)
    with pytest.raises(ValueError, match=r"one-hot maps must have shape \(batch, 5, H, W\)"):
        model.encode(torch.zeros(2, 3, 32, 32))


def _not_there(path: Path) -> None:
    pass


def _noise(path: Path) -> None:
    path.write_bytes(b"\x00" * 100)


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _truncated(path: Path) -> None:
    save_vqgan(small(), path)
    path.write_bytes(path.read_bytes()[:-100])


def _other_weights(path: Path) -> None:
    config = small(base_channels=16).config.model_dump_json()
    metadata = {"format": "megatron_nuwa.vqgan/1", "config": config}
    save_file(small().state_dict(), path, metadata=metadata)


def _other_settings(path: Path) -> None:
    config = json.dumps({**small().config.model_dump(), "depth": 3})
    metadata = {"format": "megatron_nuwa.vqgan/1", "config": config}
    save_file(small().state_dict(), path, metadata=metadata)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_not_there, "does not exist"),
        (_noise, "is not a readable safetensors file"),
        (_foreign, "was not written by launch/train_vqgan.py"),
        (_truncated, "is not a readable safetensors file"),
        (_other_weights, "holds other weights than its settings describe"),
        (_other_settings, "unknown key 'depth'"),
    ],
)
def test_files_that_are_no_vqgan_are_refused_by_name(make, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    make(path)
    with pytest.raises(UserError, match=sentence) as caught:
        load_vqgan(path)
    assert str(path) in str(caught.value)
