from .conclusion import Conclusion, Point, clear, conclude, control_differences
from .neuron_dashboard import neurons_page, show_neurons, visible_token, write_dashboard
from .neuron_geometry import anchor, ridges, score_map, svg_number
from .neuron_page import write_neuron_page
from .page import render, write_report
from .sections import front_figure, gate, judges, two_judges

__all__ = [
    "Conclusion",
    "Point",
    "anchor",
    "clear",
    "conclude",
    "control_differences",
    "front_figure",
    "gate",
    "judges",
    "neurons_page",
    "render",
    "ridges",
    "score_map",
    "show_neurons",
    "svg_number",
    "two_judges",
    "visible_token",
    "write_dashboard",
    "write_neuron_page",
    "write_report",
]
