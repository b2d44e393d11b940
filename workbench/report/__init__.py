"""The pages that say what a run found, and a conclusion from its tables in words."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
