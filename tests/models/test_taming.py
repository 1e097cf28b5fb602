"""Checkpoints in taming-transformers' layout become this VQ-GAN, exactly, without running code."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, run_command_line
from safetensors.torch import save_file
from taming_reference import Published, images_of, random_state, tokens_of

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.models.taming import load_taming
from megatron_nuwa.models.vqgan import load_vqgan

SMALL = Published(ch_mult=(1, 2, 2), resolution=32, n_embed=64, attn_resolutions=(16,))
NETWORKS = {
    "F16 with 1,024 codes, attention at 16": Published(),
    "F16 with two blocks": Published(num_res_blocks=2, z_channels=32, embed_dim=32),
    "F8, attention at 16": Published(ch_mult=(1, 2, 2, 4), resolution=128),
    "F8 without": Published(ch_mult=(1, 2, 2, 4), attn_resolutions=()),
    "F4, attention at 16 and 8": SMALL._replace(attn_resolutions=(16, 8)),
    "maps of 5 classes": SMALL._replace(channels=5),
}


def written(folder: Path, net: Published, **changes: Any) -> tuple[Path, Path]:
    """A Lightning checkpoint's content and its YAML; `changes` of state dict entries."""
    state = random_state(net)
    state |= changes
    state = {name: value for name, value in state.items() if value is not None}
    checkpoint, configuration = folder / "last.ckpt", folder / "model.yaml"
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, checkpoint)
    configuration.write_text(yaml.safe_dump(net.tree()))
    return checkpoint, configuration


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_tokens_are_the_same_numbers_and_reconstructions_the_same(
    name: str, tmp_path: Path
) -> None:
    net = NETWORKS[name]
    model = load_taming(*written(tmp_path, net))
    state = random_state(net)
    side = 64 if net.resolution > 64 else net.resolution
    generator = torch.Generator().manual_seed(1)
    if net.channels == 3:
        images = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    else:
        images = one_hot(torch.randint(0, 5, (2, side, side), generator=generator), 5)
    expected = tokens_of(state, net, images)
    tokens = model.encode(images)
    assert torch.equal(tokens, expected)
    assert len(tokens.unique()) > 4
    found = model.decode(tokens)
    assert float(found.std()) > 0.05
    # In double precision, so that what differs but for rounding would show.
    exact = {key: value.double() for key, value in state.items()}
    decoded = images_of(exact, net, expected)
    if net.channels == 3:
        decoded = decoded.clamp(-1, 1)
    torch.testing.assert_close(model.double().decode(tokens), decoded, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.double(), decoded, rtol=0, atol=1e-5)


def test_the_command_writes_a_file_that_all_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.import_vqgan import main

    checkpoint, configuration = written(tmp_path, SMALL)
    save_file(random_state(SMALL), tmp_path / "weights.safetensors")
    files = []
    for source in (checkpoint, tmp_path / "weights.safetensors"):
        output = tmp_path / f"{source.stem}-ours.safetensors"
        options = ("--config", configuration, "--output", output, "--image-size", "48")
        monkeypatch.setattr(sys, "argv", ["import_vqgan.py", *map(str, (source, *options))])
        main()
        shown = capsys.readouterr().out
        assert "48² pixels to 12² tokens, 64 codes; fingerprint" in shown
        files.append(load_vqgan(output))
    first, second = (model.state_dict() for model in files)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(UserError, match="exists already"):
        main()
    done = run_command_line(sys.executable, ROOT / "launch/import_vqgan.py", "--help")
    assert "python launch/import_vqgan.py last.ckpt --config model.yaml" in done.stdout


def test_objects_of_the_trainer_are_passed_over_and_never_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = types.ModuleType("some_trainer")
    made: list[str] = []

    class Callback(dict):  # type: ignore[type-arg]
        def __setstate__(self, state: object) -> None:
            made.append("callback")

    def rebuild(text: str) -> Callback:
        made.append(text)
        return Callback()

    class Reduced:
        def __reduce__(self) -> Any:
            return rebuild, ("reduced",)

    for item in (Callback, rebuild, Reduced):
        item.__module__ = "some_trainer"
        item.__qualname__ = item.__name__
        setattr(trainer, item.__name__, item)
    monkeypatch.setitem(sys.modules, "some_trainer", trainer)
    checkpoint, configuration = written(tmp_path, SMALL)
    callback = Callback({"best": 1})
    callback.score = 2  # type: ignore[attr-defined]
    content = torch.load(checkpoint, weights_only=True)
    content |= {"callbacks": {Callback: callback}, "hyper_parameters": Reduced()}
    torch.save(content, checkpoint)
    made.clear()
    model = load_taming(checkpoint, configuration)
    assert made == []
    assert torch.equal(model.quantizer.table, random_state(SMALL)["quantize.embedding.weight"])


class _Harmful:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch harmed",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, configuration = written(tmp_path, SMALL)
    torch.save({"state_dict": random_state(SMALL), "x": _Harmful()}, checkpoint)
    with pytest.raises(UserError, match=r"save its state dict alone"):
        load_taming(checkpoint, configuration)
    assert not (tmp_path / "harmed").exists()


def _with(path: Path, **changes: Any) -> None:
    """Change fields of the published configuration: of ddconfig, or of the model's parameters."""
    tree = yaml.safe_load(path.read_text())
    params = tree["model"]["params"]
    for name, value in changes.items():
        group = params if name in ("n_embed", "embed_dim", "remap") else params["ddconfig"]
        if name == "target":
            group = tree["model"]
        group[name] = value
    path.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"double_z": True}, "ddconfig: double_z must be False, not true"),
        ({"resamp_with_conv": False}, "ddconfig: resamp_with_conv must be True, not false"),
        ({"target": "taming.models.vqgan.GumbelVQ"}, "whose tokens are not its nearest codes"),
        ({"remap": "used.npy"}, "renumbers the tokens"),
        ({"z_chanels": 8}, "unknown key 'z_chanels'; did you mean 'z_channels'?"),
        ({"ch": 20}, "ddconfig: ch must be a multiple of 32, not 20"),
        ({"out_ch": 4}, "in_channels 3 and out_ch 4 must be equal"),
        ({"n_embed": 65}, "quantize.embedding.weight has shape (64, 40), but"),
        ({"num_res_blocks": 2}, "has no 'encoder.down.0.block.1.norm1.weight'"),
        ({"attn_resolutions": []}, "holds 'decoder.up.1.attn.0.k.bias', which the configuration"),
        ({"ch_mult": [1] * 7}, "downsampling must be 4, 8 or 16, not 64"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    checkpoint, configuration = written(tmp_path, SMALL)
    _with(configuration, **changes)
    with pytest.raises(UserError) as caught:
        load_taming(checkpoint, configuration)
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read as tensors"),
        (b"noise" * 100, "cannot be read as tensors"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    checkpoint, configuration = written(tmp_path, SMALL)
    checkpoint.unlink()
    if content is not None:
        checkpoint.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_taming(checkpoint, configuration)
    torch.save({"epoch": 3}, checkpoint)
    with pytest.raises(UserError, match="holds no state dict"):
        load_taming(checkpoint, configuration)
    configuration.write_text("model: {params: {}}")
    with pytest.raises(UserError, match="has no 'ddconfig'"):
        load_taming(checkpoint, configuration)
