"""The recipe: one YAML file that says everything about a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_nuwa.config import Settings, load_settings
from megatron_nuwa.data.batches import TaskName
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.parallel.units import Recomputation
from megatron_nuwa.training.fused import AdamKind, NormKind
from megatron_nuwa.training.guard import GuardSettings
from megatron_nuwa.training.schedule import ScheduleSettings
from megatron_nuwa.training.vqgan_recipe import VqganRecipe


class TokenizerPaths(Settings):
    """The tokenizers that wrote the corpora."""

    vqgan: Path
    bpe: Path
    # VQ-GAN-Seg, for models that read sketches.
    sketch_vqgan: Path | None = None


class TaskSettings(Settings):
    """One task of the sum `L = L_T2I + L_V2V + L_T2V`, or one from sketches."""

    # Folders or addresses; a path would fold the slashes of `hdfs:///corpora/vatex`.
    corpora: list[str] = Field(min_length=1)
    # Each corpus's share of the samples; null for shares by size, every item once an epoch.
    corpus_weights: list[Annotated[float, Field(gt=0)]] | None = None
    # Samples a step over all processes.
    batch_size: int = Field(ge=1)
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _every_corpus_has_a_weight(self) -> TaskSettings:
        if self.corpus_weights is not None and len(self.corpus_weights) != len(self.corpora):
            raise ValueError(
                f"corpus_weights has {len(self.corpus_weights)} numbers for "
                f"{len(self.corpora)} corpora; give one a corpus"
            )
        return self


class DataSettings(Settings):
    """Which corpora feed which task."""

    tasks: dict[TaskName, TaskSettings] = Field(min_length=1)
    # Every data-parallel replica cuts its share of each task's batch into this many micro-batches,
    accumulation: int = Field(1, ge=1)
    # or into micro-batches of at most this many target tokens, but at least one sample.
    micro_batch_tokens: int | None = Field(None, ge=1)
    # How often "None" takes a caption's place; a sketch's, in all of a step's samples at once.
    caption_dropout: float = Field(0.1, ge=0, le=1)
    # Shards whose items are shuffled with one another, for remote corpora; null for all of them.
    shuffle_window: int | None = Field(None, ge=1)
    # Steps from now whose shards of remote corpora are fetched already.
    read_ahead: int = Field(16, ge=0)

    @model_validator(mode="after")
    def _cut_one_way(self) -> DataSettings:
        if self.micro_batch_tokens is not None and self.accumulation != 1:
            raise ValueError(
                "accumulation and micro_batch_tokens both say how a batch is cut; leave one out"
            )
        return self


class OptimizerSettings(Settings):
    """Adam, as the paper trains."""

    name: Literal["adam", "adamw"] = "adam"
    implementation: AdamKind = "auto"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clipping: float = Field(1.0, ge=0)
    # Patterns of weights that stay as they are, such as "encoder.*" or "text_*".
    frozen: list[str] = Field(default_factory=list)


class TrainingSettings(Settings):
    """How the run is carried out."""

    deepspeed_config: Path = Path("ds_configs/zero1_bf16.json")
    # What is computed a second time in the backward pass instead of being kept: nothing, what is
    # cheap (norms, GELU, dropout, sums), or whole layers.
    checkpoint_activations: Recomputation = "none"
    # Have torch.compile fuse what lies between the matrix products of a layer, and the loss. The
    # first step of every shape waits for the compiler. For GPUs, and for fp32 on CPUs.
    compile: bool = False
    # Whose layer norms; "auto" takes apex's fused ones on GPUs that have it.
    norm: NormKind = "auto"
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    # The newest so many checkpoints stay, and those of every so many steps.
    keep_checkpoints: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)
    # Memory of a node for copies of what is being saved, GiB; null for half of what is free. A
    # file that does not fit is written while the next optimizer step waits.
    copy_gib: float | None = Field(None, ge=0)
    # Save and end after this step although the schedule is longer.
    stop_at_step: int | None = Field(None, ge=1)
    # A process without progress for so long ends the run.
    hang_seconds: float = Field(1800, gt=0)
    guard: GuardSettings = GuardSettings()


class StartSettings(Settings):
    """Where a new run takes its weights from; a run that has a checkpoint continues from that."""

    # A run, one of its checkpoints, or a file of launch/export.py.
    weights: Path
    # Patterns of weights that begin anew all the same, such as "visual_embedding.*".
    fresh: list[str] = Field(default_factory=list)


class EvaluationSettings(Settings):
    """Held-out cross-entropy, against the unigram entropy of the same tokens."""

    every: int = Field(1000, ge=1)
    corpora: dict[TaskName, list[str]] = Field(min_length=1)
    batch_size: int = Field(8, ge=1)
    # Items a task; null for all.
    items: int | None = Field(None, ge=1)


class SampleSettings(Settings):
    """Pictures and clips of the current model in TensorBoard and RUN/samples."""

    every: int = Field(5000, ge=1)
    prompts: list[str] = Field(min_length=1)
    seed: int = 0
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    guidance: float = Field(1.0, ge=0, le=1e6)


class Recipe(Settings):
    """Everything about a run; sections that a command does not need may be left out."""

    name: str
    seed: int = Field(0, ge=0)
    # The folder of the pretraining run; the VQ-GAN's own is vqgan.run.
    run: Path | None = None
    vqgan: VqganRecipe | None = None
    # VQ-GAN-Seg, trained with launch/train_vqgan.py --section sketch_vqgan.
    sketch_vqgan: VqganRecipe | None = None
    model: NuwaConfig | None = None
    tokenizers: TokenizerPaths | None = None
    data: DataSettings | None = None
    # Trained weights that a new run begins with.
    start: StartSettings | None = None
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings | None = None
    samples: SampleSettings | None = None

    @field_validator("name")
    @classmethod
    def _name_is_set(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @model_validator(mode="after")
    def _name_the_section(self) -> Recipe:
        if self.sketch_vqgan is not None:
            self.sketch_vqgan._section = "sketch_vqgan"
        return self

    def require(self, *sections: str) -> None:
        """`UserError` that names the first of the sections that the recipe leaves out."""
        for section in sections:
            if getattr(self, section) is None:
                raise UserError(
                    f"recipe '{self.name}' has no section '{section}', which this command needs"
                )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with dotted overrides; `UserError` names the file and the field."""
    return load_settings(Recipe, path, overrides)
