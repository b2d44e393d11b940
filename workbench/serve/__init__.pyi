from .catalogue import Catalogue, Choice
from .command import app_of, run_server, serve
from .prepare import Limits

__all__ = [
    "Catalogue",
    "Choice",
    "Limits",
    "app_of",
    "run_server",
    "serve",
]
