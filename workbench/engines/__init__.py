"""Where a model runs: in this process, in vLLM, or on many machines through Ray."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
