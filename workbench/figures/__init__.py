"""Figures: tables in, pictures out; no figure needs a model or the network."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
