"""Charts as SVG, drawn by pygal from the rollups. Only numbers and our own words stand in them."""

from __future__ import annotations

import sys
from typing import Any, Final

import pygal
from pygal.style import Style

from webhook_api.web.words import Words

# pygal adds a finder for its maps to the interpreter's imports, in a form that Python 3.12 has given up. No maps are drawn.
sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, pygal.PluginImportFixer)]

NAMES: Final = ("deliveries", "latency")
THEMES: Final = ("light", "dark")
_INK: Final = {
    "light": {"text": "#596171", "faint": "#e3e6ec", "good": "#635bff", "bad": "#d64545", "other": "#8e96a8"},
    "dark": {"text": "#a3acba", "faint": "#2b3140", "good": "#8f88ff", "bad": "#ff7b72", "other": "#7d8797"},
}


def draw(name: str, theme: str, hours: list[dict[str, Any]], words: Words, *, small: bool = False) -> bytes:
    """A chart over the last 24 hours; ``small``: for a telephone."""
    chart = _deliveries(theme, words, hours) if name == "deliveries" else _latency(theme, words, hours)
    if small:
        chart.config.width, chart.config.height = 400, 230
    chart.x_labels = [row["starts_at"].astimezone(words.zone).strftime("%H:%M") for row in hours]
    chart.x_labels_major_every = 4
    svg: bytes = chart.render()
    return svg


def _style(theme: str, *colours: str) -> Style:
    ink = _INK[theme]
    return Style(
        background="transparent", plot_background="transparent", foreground=ink["text"],
        foreground_strong=ink["text"], foreground_subtle=ink["faint"], guide_stroke_color=ink["faint"],
        major_guide_stroke_color=ink["faint"], guide_stroke_dasharray="0", major_guide_stroke_dasharray="0",
        opacity="1", opacity_hover="1", transition="0s", colors=tuple(ink[colour] for colour in colours),
        font_family="system-ui, sans-serif", label_font_size=11, major_label_font_size=11, legend_font_size=12,
    )  # fmt: skip


def _options(theme: str, *colours: str) -> dict[str, Any]:
    return {
        "style": _style(theme, *colours), "width": 760, "height": 220, "js": (), "show_x_guides": False,
        "show_minor_x_labels": False, "legend_at_bottom": True, "legend_at_bottom_columns": 2, "legend_box_size": 10,
        "truncate_legend": -1, "truncate_label": -1, "margin": 8, "spacing": 8, "no_prefix": True, "explicit_size": False,
        "include_x_axis": True, "no_data_text": "–", "max_scale": 4,
    }  # fmt: skip


def _deliveries(theme: str, words: Words, hours: list[dict[str, Any]]) -> Any:
    chart = pygal.StackedBar(**_options(theme, "good", "bad"), value_formatter=lambda value: f"{value:.0f}")
    chart.add(words.say("chart.other"), [row["deliveries"] - row["failed"] for row in hours])
    chart.add(words.say("chart.failed"), [row["failed"] for row in hours])
    return chart


def _latency(theme: str, words: Words, hours: list[dict[str, Any]]) -> Any:
    unit = words.say("unit.s")
    chart = pygal.Line(**_options(theme, "good", "other"), show_dots=True, dots_size=2,
                       stroke_style={"width": 2}, value_formatter=lambda value: f"{value:g} {unit}")  # fmt: skip
    for name in ("p50", "p95"):
        values = [None if row[name] is None else round(row[name], 3) for row in hours]
        chart.add(words.say(f"chart.{name}"), values)
    return chart
