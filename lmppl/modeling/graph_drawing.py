"""Pictures of a `FactorGraph`, from left to right: c → π0 → x → features → factors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmppl.errors import MissingDependency

if TYPE_CHECKING:
    from lmppl.modeling.graph import FactorGraph

__all__ = ["draw_png", "mermaid"]

# Variables are round, functions rounded, factors square, as in the factor graphs of the literature.
MERMAID_SHAPES = {
    "context": ("((", "))"),
    "prior": ("[", "]"),
    "sequence": ("((", "))"),
    "feature": ("([", "])"),
    "factor": ("[", "]"),
}
BOXES = {
    "context": ("circle,pad=0.55", "#ffffff", "#334155"),
    "prior": ("square,pad=0.55", "#e2e8f0", "#334155"),
    "sequence": ("circle,pad=0.75", "#ffffff", "#334155"),
    "feature": ("round,pad=0.5,rounding_size=0.9", "#e0f2fe", "#0369a1"),
    "factor": ("square,pad=0.55", "#fef3c7", "#b45309"),
}
HEADINGS = ("context", "prior", "sequence", "features", "factors")
INK, GREY = "#0f172a", "#64748b"
ROW, GAP, MARGIN, HEAD = 0.8, 0.9, 0.25, 0.3  # inches


def mermaid(graph: FactorGraph) -> str:
    """The flow chart as Mermaid text."""
    network = graph.network
    short = {key: f"n{i}" for i, key in enumerate(network)}
    lines = ["flowchart LR"]
    for key, node in network.nodes(data=True):
        left, right = MERMAID_SHAPES[node["kind"]]
        label = node["label"].replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
        label = label.replace("\n", "<br>")
        if key == "c" and graph.num_contexts > 1:
            label += f"<br>{graph.num_contexts} contexts"
        lines.append(f'    {short[key]}{left}"{label}"{right}')
    lines += [f"    {short[a]} --> {short[b]}" for a, b in network.edges]
    return "\n".join(lines) + "\n"


def draw_png(graph: FactorGraph, path: Path) -> Path:
    """The picture as a PNG file; its size follows from the labels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("drawing needs matplotlib: pip install 'lmppl[draw]'") from error

    network = graph.network
    layers: list[list[str]] = [[] for _ in HEADINGS]
    for key, node in network.nodes(data=True):
        layers[node["layer"]].append(key)
    _untangle(network, layers)
    widths = [max([_label_width(network.nodes[key]["label"]) for key in layer], default=0.0) for layer in layers]
    used = [i for i, layer in enumerate(layers) if layer]
    height = ROW * max(len(layer) for layer in layers) + 2 * MARGIN + HEAD
    width = sum(widths[i] for i in used) + GAP * (len(used) - 1) + 2 * MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # one unit is one inch
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()

    middle, left = (height - HEAD) / 2, MARGIN
    texts: dict[str, Any] = {}
    for i in used:
        centre = left + widths[i] / 2
        heading = f"{graph.num_contexts} contexts" if i == 0 and graph.num_contexts > 1 else HEADINGS[i]
        axes.text(centre, height - HEAD, heading, ha="center", va="center", fontsize=9, color=GREY)
        for row, key in enumerate(layers[i]):
            texts[key] = _node(axes, network.nodes[key], centre, middle + ROW * ((len(layers[i]) - 1) / 2 - row))
        left += widths[i] + GAP
    figure.draw_without_rendering()  # boxes get their size when drawn
    inches = axes.transData.inverted()
    boxes = {key: text.get_bbox_patch().get_window_extent().transformed(inches) for key, text in texts.items()}
    for source, target in network.edges:
        skips = network.nodes[target]["layer"] - network.nodes[source]["layer"] > 1 and source == "c"
        start, end = boxes[source], boxes[target]
        axes.annotate(
            "",
            xy=(end.x0, (end.y0 + end.y1) / 2 + (0.06 if skips else 0)),
            xytext=((start.x0 + start.x1) / 2, start.y1) if skips else (start.x1, (start.y0 + start.y1) / 2),
            zorder=1,
            arrowprops={
                "arrowstyle": "-|>",
                "color": GREY,
                "linewidth": 1.2,
                "mutation_scale": 13,
                "shrinkA": 1,
                "shrinkB": 2,
                "linestyle": (0, (4, 2)) if skips else "solid",
                "connectionstyle": "arc3,rad=-0.25" if skips else "arc3,rad=0",
            },
        )
    figure.savefig(path, format="png", metadata={"Software": "lmppl"})
    return path


def _node(axes: Any, node: dict[str, Any], x: float, y: float) -> Any:
    style, face, edge = BOXES[node["kind"]]
    box = {"boxstyle": style, "facecolor": face, "edgecolor": edge, "linewidth": 1.4}
    return axes.text(
        x,
        y,
        node["label"],
        ha="center",
        va="center",
        fontsize=11,
        color=INK,
        linespacing=1.35,
        bbox=box,
        zorder=2,
    )


def _label_width(label: str) -> float:
    """Inches that a box with this label takes at 11 points, about."""
    return 0.088 * max(len(line) for line in label.split("\n")) + 0.4


def _untangle(network: Any, layers: list[list[str]]) -> None:
    """Order the factors by the mean place of the features that they read, so that few arrows cross."""
    place = {key: i for i, key in enumerate(layers[3])}

    def mean_place(key: str) -> float:
        read = [place[source] for source in network.predecessors(key) if source in place]
        return sum(read) / len(read) if read else float(len(place))

    layers[4].sort(key=mean_place)
