"""The catalogue of the demo's media: what is cut from which package, and what is seen there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from megatron_nuwa.config import Settings, load_settings

CATALOGUE_PATH = Path(__file__).with_name("catalogue.yaml")

# Times of the catalogue are decimal fractions, so sums of them are compared with a little slack.
_SLACK_SECONDS = 1e-6

View = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=16)]]
Captions = Annotated[list[str], Field(min_length=1)]


class Shot(Settings):
    """Clips that begin at regular times and show the same thing, with captions per view."""

    starts: tuple[float, float, Annotated[float, Field(gt=0)]]
    captions: dict[str, Captions]

    def start_times(self) -> list[float]:
        """Seconds at which clips begin: first, first + step, …, last."""
        first, last, step = self.starts
        count = int((last - first) / step + _SLACK_SECONDS) + 1
        return [round(first + step * i, 3) for i in range(count)]


class Video(Settings):
    """One video of a package, the views that are cropped out of it and its shots."""

    name: str
    package: str
    path: str
    heldout_from: float
    views: dict[str, View]
    shots: list[Shot]

    @model_validator(mode="after")
    def _views_are_known(self) -> Video:
        for shot in self.shots:
            for view in shot.captions:
                if view not in self.views:
                    raise ValueError(f"the video '{self.name}' has no view '{view}'")
        return self


class Crop(Settings):
    """One square of a photograph, `[x, y, side]`, with its captions."""

    view: View
    captions: Captions


class Photograph(Settings):
    """One photograph of a package and the crops that are taken from it."""

    name: str
    package: str
    path: str
    train: tuple[Crop, ...] = ()
    heldout: tuple[Crop, ...] = ()


class Catalogue(Settings):
    """Everything that the demo's media are cut from."""

    clip_seconds: float = Field(gt=0)
    side: int = Field(ge=16)
    licences: dict[str, str]
    videos: list[Video]
    photographs: list[Photograph]


@dataclass(frozen=True)
class Cut:
    """One clip (`start` and `seconds` set) or one still image to be cut from a source."""

    id: str
    source: str
    package: str
    path: str
    view: tuple[int, int, int]
    captions: tuple[str, ...]
    heldout: bool
    start: float | None = None
    seconds: float | None = None


def load_catalogue(path: Path = CATALOGUE_PATH) -> Catalogue:
    """Read the catalogue; `UserError` names the file and the field that is wrong."""
    return load_settings(Catalogue, path, noun="catalogue")


def clip_cuts(catalogue: Catalogue, video: Video) -> Iterator[Cut]:
    """All clips of one video; `ValueError` where a clip would lie on both sides of the split."""
    for shot in video.shots:
        for start in shot.start_times():
            heldout = start >= video.heldout_from - _SLACK_SECONDS
            end = start + catalogue.clip_seconds
            if not heldout and end > video.heldout_from + _SLACK_SECONDS:
                raise ValueError(
                    f"the clip of '{video.name}' at {start} s runs into the held-out part"
                )
            for view, captions in shot.captions.items():
                yield Cut(
                    id=f"{video.name}-{view}-{round(start * 1000):05d}",
                    source=video.name,
                    package=video.package,
                    path=video.path,
                    view=video.views[view],
                    captions=tuple(captions),
                    heldout=heldout,
                    start=start,
                    seconds=catalogue.clip_seconds,
                )


def image_cuts(photograph: Photograph) -> Iterator[Cut]:
    """All crops of one photograph."""
    for heldout, crops in ((False, photograph.train), (True, photograph.heldout)):
        for crop in crops:
            x, y, side = crop.view
            yield Cut(
                id=f"{photograph.name.replace(' ', '-')}-{x}-{y}-{side}",
                source=photograph.name,
                package=photograph.package,
                path=photograph.path,
                view=crop.view,
                captions=tuple(crop.captions),
                heldout=heldout,
            )
