"""A trained model in one file: what it holds, who takes it, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SmallWorld, lone_process, without_privileges
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.trained import open_generator
from megatron_nuwa.models import weights_file
from megatron_nuwa.models.vqgan import fingerprint, load_vqgan
from megatron_nuwa.training import checkpoint
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.trained_model import open_trained

Export = Callable[..., None]


@pytest.fixture(scope="module")
def run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps in fp32."""
    return train(small_world, tmp_path_factory.mktemp("run") / "run", "zero1_fp32")


def train(world: SmallWorld, run: Path, layout: str) -> Path:
    recipe = load_recipe(world.recipe, [f"run={run}", "training.stop_at_step=2"])
    pretrain(recipe, ROOT / f"ds_configs/{layout}.json", lone_process())
    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Export:
    """launch/export.py in this process."""
    spec = importlib.util.spec_from_file_location("export", ROOT / "launch/export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "export", module)
    spec.loader.exec_module(module)

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["export", *(str(part) for part in arguments)])
        module.main()

    return call


def test_a_file_generates_what_its_run_generates(
    run: Path, small_world: SmallWorld, tmp_path: Path, command: Export
) -> None:
    file = tmp_path / "models/small.safetensors"
    command("model", run, "--output", file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    weights = load_file(run / "checkpoints/step_00000002/model.safetensors")
    exported = load_file(file)
    for name, value in weights.items():
        assert exported[f"model.{name}"].equal(value), name
    of_run, of_file = open_generator(run, "--run"), open_generator(file, "--model")
    assert (of_file.image_grid, of_file.clip_grid) == (of_run.image_grid, of_run.clip_grid)
    assert of_file.frames_per_second == of_run.frames_per_second == 8.0
    assert fingerprint(of_file.vqgan) == fingerprint(load_vqgan(small_world.vqgan))
    assert of_file.bpe.fingerprint == TextTokenizer.load(small_world.bpe).fingerprint
    pixels = [
        generator.pixels(
            generator.generate(["a blue circle"], generator.clip_grid, [1], SamplingSettings()),
            generator.clip_grid,
        )
        for generator in (of_run, of_file)
    ]
    assert (pixels[0] == pixels[1]).all()


def test_a_run_in_bf16_gives_the_full_precision_that_it_trained_in(
    small_world: SmallWorld, tmp_path: Path, command: Export
) -> None:
    checkpoint = train(small_world, tmp_path / "run", "zero1_bf16") / "checkpoints/step_00000002"
    command("model", checkpoint, "--output", tmp_path / "full.safetensors")
    command("model", checkpoint, "--output", tmp_path / "half.safetensors", "--precision", "bf16")
    full, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    used = load_file(checkpoint / "model.safetensors")
    finer = 0
    for name, value in used.items():
        assert value.dtype == half[f"model.{name}"].dtype == torch.bfloat16
        assert half[f"model.{name}"].equal(value)
        assert full[f"model.{name}"].bfloat16().equal(value)
        finer += not full[f"model.{name}"].equal(value.float())
    assert finer > len(used) / 2


def test_a_vqgan_is_written_to_one_file_too(
    small_world: SmallWorld, tmp_path: Path, command: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vqgan.safetensors"
    command("vqgan", small_world.vqgan, "--output", file)
    assert fingerprint(load_vqgan(file)) == fingerprint(load_vqgan(small_world.vqgan))
    capsys.readouterr()
    command("show", file)
    assert "VQ-GAN of 16² pixels to 4² tokens, 32 codes of 8" in capsys.readouterr().out


def test_show_says_what_a_file_holds(
    run: Path, tmp_path: Path, command: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    command("model", run, "--output", tmp_path / "a.safetensors")
    capsys.readouterr()
    command("show", tmp_path / "a.safetensors")
    shown = capsys.readouterr().out
    assert "model of 0.07 M parameters after 2 steps" in shown
    assert "t2i 4×4×1, " in shown


def test_nothing_is_replaced_unasked_and_nothing_half_written_stays(
    run: Path, tmp_path: Path, command: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("mine")
    with pytest.raises(UserError, match="exists already; name another, or pass --overwrite"):
        command("model", run, "--output", file)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        command("model", run, "--output", tmp_path / "a.pt")

    def fail(_tensors: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights_file, "save_file", fail)
    full = (
        r"^--output .*a\.safetensors cannot be written: No space left on device \(the file takes "
    )
    with pytest.raises(UserError, match=full + r"0\.\d MB\)$"):
        command("model", run, "--output", file, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert file.read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_named_before_the_model_is_read(
    open_folder: Path, command: Export
) -> None:
    (open_folder / "notes").write_text("mine")
    places = {"a": "Permission", "new/a": "Permission", "notes/a": "Not a directory"}
    for kind in ("model", "vqgan"):
        for place, reason in places.items():
            output = open_folder / f"{place}.safetensors"
            message = f"^--output must be where one can write, not {output}: {reason}"
            with without_privileges(), pytest.raises(UserError, match=message):
                command(kind, "nowhere", "--output", output)
    assert [path.name for path in open_folder.iterdir()] == ["notes"]


def test_generation_looks_at_the_files_that_it_reads_and_at_no_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    folder = own / "checkpoints/step_00000002"
    read = []
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    for source in (own, folder):
        read.clear()
        open_generator(source, "--run")
        assert sorted(path.name for path in read) == ["model.safetensors", "state.json"]
    optimizer = next(folder.glob("*optim_states.pt"))
    optimizer.write_bytes(b"damaged")
    open_generator(own, "--run")
    # What reads the optimizer's state, such as a resume, refuses it as before.
    with pytest.raises(UserError, match=f"{optimizer.name} was changed or cut short"):
        open_trained(folder, "RUN")
    assert checkpoint.Checkpoints(folder.parent, keep=1).newest()[0] is None
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.safetensors was changed or cut short"):
        open_generator(own, "--run")


def test_a_checkpoint_that_may_not_be_read_says_so(run: Path, open_folder: Path) -> None:
    own = open_folder / "run"
    shutil.copytree(run, own)
    weights = own / "checkpoints/step_00000002/model.safetensors"
    weights.chmod(0)
    with (
        without_privileges(),
        pytest.raises(UserError, match=f"^--run: {weights} cannot be read: Permission denied$"),
    ):
        open_generator(own, "--run")


def test_what_is_no_export_is_named_and_never_unpickled(run: Path, tmp_path: Path) -> None:
    fired = tmp_path / "fired"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (fired,)  # type: ignore[return-value]

    torch.save(Trap(), tmp_path / "trap.pt")
    whole = run / "checkpoints/step_00000002/model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for name, message in {
        "trap.pt": "is not a whole safetensors file",
        "cut.safetensors": "is not a whole safetensors file",
        "foreign.safetensors": "was not written by launch/export.py",
        "nothing": "is no pretraining run, no checkpoint of one and no exported file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_trained(tmp_path / name, "start.weights")
        assert str(caught.value).startswith(f"start.weights: {tmp_path / name} ")
    assert not fired.exists()


def test_an_export_that_misses_a_weight_is_refused(
    run: Path, tmp_path: Path, command: Export
) -> None:
    file = tmp_path / "a.safetensors"
    command("model", run, "--output", file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights.pop("model.begin.vector")
    save_file(weights, file, metadata=metadata)
    with pytest.raises(UserError, match=r"has no weight 'model\.begin\.vector'"):
        open_trained(file, "FILE")
