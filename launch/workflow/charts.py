"""Charts in a form that a page can carry inside itself."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from launch.workflow.results import series
from megatron_nuwa.generation.tasks import TASKS

# Stands for the page's own text colour until the drawing is placed in the page.
_TEXT_COLOUR = "#010203"
# Seen equally well on light and dark paper, and told apart by colour-blind eyes.
COLOURS = ("#2f7de1", "#e0782b", "#2a9d6f", "#b45bc4", "#8c6d46", "#3bb3c3")


def line_chart(
    lines: dict[str, tuple[list[int], list[float]]],
    *,
    x_label: str,
    y_label: str,
    held_out: dict[str, tuple[list[int], list[float]]] | None = None,
    event: tuple[int, str] | None = None,
    logarithmic: bool = False,
    inches: tuple[float, float] = (6.2, 3.3),
) -> str:
    """An inline SVG of lines over steps; `held_out` are points, `event` an upright line.

    Points have the colour of the line of their name.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": x_label + y_label + "".join(lines),
        "font.size": 10,
        "text.color": _TEXT_COLOUR,
        "axes.labelcolor": _TEXT_COLOUR,
        "axes.edgecolor": _TEXT_COLOUR,
        "xtick.color": _TEXT_COLOUR,
        "ytick.color": _TEXT_COLOUR,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.add_subplot()
        for number, (name, (steps, values)) in enumerate(lines.items()):
            axes.plot(
                steps, values, color=COLOURS[number % len(COLOURS)], label=name, linewidth=1.8
            )
        for name, (steps, values) in (held_out or {}).items():
            colour = COLOURS[list(lines).index(name) % len(COLOURS)]
            points = {"color": colour, "markerfacecolor": "none", "markersize": 6}
            axes.plot(steps, values, "o", label=f"{name}, held out", **points)
        if event:
            axes.axvline(event[0], color=_TEXT_COLOUR, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                event[1],
                (event[0], 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -10),
                textcoords="offset points",
            )
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=_TEXT_COLOUR, alpha=0.12)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            # Above the axes: no line can run through it.
            figure.legend(loc="outside upper left", frameon=False, ncols=3)
        buffer = io.StringIO()
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=bare)
    drawing = buffer.getvalue()
    # The XML declaration and document type have no place inside a page.
    return drawing[drawing.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")


def loss_chart(log: dict[int, dict[str, float]], event: tuple[int, str] | None = None) -> str:
    """The cross-entropy of each task that a run trains on, with points for held-out items."""
    titles = {task.title: name for name, task in TASKS.items()}
    lines = {title: series(log, f"train/loss/{name}") for title, name in titles.items()}
    trained = {title: line for title, line in lines.items() if line[0]}
    held_out = {title: series(log, f"eval/loss_nats/{titles[title]}") for title in trained}
    return line_chart(
        trained,
        held_out={title: points for title, points in held_out.items() if points[0]},
        x_label="step",
        y_label="nats a token",
        event=event,
        inches=(11.0, 3.9),
    )
