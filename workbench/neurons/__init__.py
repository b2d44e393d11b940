"""Neurons: which units carry a risk category, what they read and write, and whether silencing them matters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
