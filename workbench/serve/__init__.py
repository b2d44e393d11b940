"""Serve: a run's steered model at an endpoint that OpenAI's clients know."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
