"""Evaluation: answers under several conditions become tables with intervals and controls."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
