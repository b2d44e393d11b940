"""Figures: pictures drawn from tables of results; no figure needs a model or the network."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
