from .conclusion import Conclusion, conclude, control_differences
from .neuron_dashboard import neurons_page, show_neurons, write_dashboard
from .neuron_page import write_neuron_page
from .page import write_report

__all__ = [
    "Conclusion",
    "conclude",
    "control_differences",
    "neurons_page",
    "show_neurons",
    "write_dashboard",
    "write_neuron_page",
    "write_report",
]
