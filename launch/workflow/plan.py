"""The stages that every run has between its media and pretraining, and where their files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.workflow.stage import PROCESSES, Stage, mpi_environment

BPE_VOCABULARY = 1024
CORPORA = ("train-clips", "train-images", "heldout-clips", "heldout-images")
# The stages that `Plan.token_stages` makes.
TOKEN_STAGES = ("vqgan", "sketch-vqgan", "bpe", "tokenize")


@dataclass(frozen=True)
class Plan:
    """One run: its recipe, its folder, and how its commands are started.

    `overrides` are recipe fields of every `deepspeed` command, which starts `processes` with the
    variables of `environment`.
    """

    recipe: Path
    output: Path
    overrides: tuple[str, ...] = ()
    processes: int = PROCESSES
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def media(self) -> Path:
        """Folder of clips, images, sketches and their manifests."""
        return self.output / "media"

    @property
    def pretrain(self) -> Path:
        """Folder of the pretraining run."""
        return self.output / "pretrain"

    @property
    def samples(self) -> Path:
        """Folder of what was generated."""
        return self.output / "samples"

    @property
    def page(self) -> Path:
        """The report."""
        return self.output / "report.html"

    @property
    def vqgan(self) -> Path:
        """Run folder of the tokenizer of frames."""
        return self.output / "vqgan"

    @property
    def sketch_vqgan(self) -> Path:
        """Run folder of the tokenizer of sketches."""
        return self.output / "sketch_vqgan"

    @property
    def bpe(self) -> Path:
        """The text vocabulary."""
        return self.output / "bpe.json"

    @property
    def manifests(self) -> dict[str, Path]:
        """Manifest of each corpus."""
        return {name: self.media / f"{name}.jsonl" for name in CORPORA}

    @property
    def corpora(self) -> tuple[Path, ...]:
        """The file of each corpus that says it is complete."""
        return tuple(self.output / "corpus" / name / "corpus.json" for name in CORPORA)

    def deepspeed(self, script: str, *extra: str) -> tuple[str, ...]:
        """The command that trains, of a script and further recipe fields."""
        launcher = ("deepspeed", "--num_accelerators", str(self.processes))
        return (*launcher, script, str(self.recipe), *self.overrides, *extra)

    def generate(self, task: str, *options: str, name: str = "") -> tuple[str, ...]:
        """The command that generates into the folder `name` of the samples (default: the task)."""
        head = ("python", "launch/generate.py", task, "--run", str(self.pretrain))
        return (*head, *options, "--output", str(self.samples / (name or task)))

    def stage(self, name: str, title: str, *commands: tuple[str, ...], **fields: Any) -> Stage:
        """A stage whose commands get this run's variables."""
        return Stage(name, title, commands, environment=self.environment, **fields)

    def token_stages(
        self,
        media: Iterable[Path],
        farm_options: Callable[[str], tuple[str, ...]],
        after: tuple[str, ...] = (),
    ) -> list[Stage]:
        """VQ-GANs, text vocabulary and corpora.

        They are made anew when a file of `media` or a stage of `after` has changed; `farm_options`
        are the farm's own for the corpus of a name.
        """
        media = tuple(media)
        both = tuple(run / "vqgan.safetensors" for run in (self.vqgan, self.sketch_vqgan))
        return [
            self._vqgan_stage("vqgan", "frames", self.vqgan, media, after),
            self._vqgan_stage("sketch-vqgan", "sketches", self.sketch_vqgan, media, after),
            Stage(
                "bpe",
                "Learn the text vocabulary from the captions",
                (self._train_bpe(),),
                inputs=(self.manifests["train-clips"], self.manifests["train-images"]),
                outputs=(self.bpe,),
                clears=(self.bpe,),
            ),
            Stage(
                "tokenize",
                "Turn clips, images, sketches and captions into token shards with two MPI ranks",
                tuple(self._tokenize(name, farm_options(name)) for name in CORPORA),
                inputs=(*media, *self.manifests.values(), *both, self.bpe),
                outputs=self.corpora,
                clears=(self.output / "corpus",),
                after=after,
                environment={**self.environment, **mpi_environment()},
            ),
        ]

    def _vqgan_stage(
        self, name: str, what: str, run: Path, media: tuple[Path, ...], after: tuple[str, ...]
    ) -> Stage:
        section = ("--section", run.name) if run.name != "vqgan" else ()
        return self.stage(
            name,
            f"Train the VQ-GAN that turns {what} into tokens",
            self.deepspeed("launch/train_vqgan.py", *section),
            inputs=(self.recipe, *media),
            outputs=(run / "vqgan.safetensors", run / "evaluation.json"),
            clears=(run,),
            after=after,
        )

    def _train_bpe(self) -> tuple[str, ...]:
        command = ("python", "-m", "preprocessing", "train-bpe")
        sources = (str(self.manifests["train-clips"]), str(self.manifests["train-images"]))
        size = ("--vocabulary-size", str(BPE_VOCABULARY))
        return (*command, *sources, "--output", str(self.bpe), *size, "--overwrite")

    def _tokenize(self, name: str, options: tuple[str, ...]) -> tuple[str, ...]:
        # Open MPI pins each of two ranks to one core unless told otherwise, which throttles ffmpeg.
        launcher = ("mpirun", "-n", str(PROCESSES), "--bind-to", "none", "--oversubscribe")
        command = ("python", "-m", "preprocessing", "tokenize", str(self.manifests[name]))
        return (
            *(*launcher, *command, "--output", str(self.output / "corpus" / name)),
            *("--vqgan", str(self.vqgan), "--sketch-vqgan", str(self.sketch_vqgan)),
            *("--bpe", str(self.bpe), *options),
        )


def repeated(flag: str, values: Iterable[str]) -> tuple[str, ...]:
    """A command-line option once for each value."""
    return tuple(word for value in values for word in (flag, value))


def moved(recipe: Path, named: Path, output: Path) -> Iterator[str]:
    """Recipe fields that move a run from the folder `named` in the recipe to another one."""
    if output == named:
        return
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for name, value in _leaves(tree):
        changed = _replaced(value, named, output)
        if changed != value:
            text = yaml.safe_dump(changed, default_flow_style=True, width=10**6).strip()
            # YAML ends a document that is one bare word with a line of dots.
            yield f"{name}={text.removesuffix('...').strip()}"


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _replaced(value: Any, old: Path, new: Path) -> Any:
    if isinstance(value, list):
        return [_replaced(one, old, new) for one in value]
    if isinstance(value, str) and Path(value).is_relative_to(old):
        return str(new / Path(value).relative_to(old))
    return value
