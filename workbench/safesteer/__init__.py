"""SafeSteer: the whole recipe, from prompts to a run folder, and steering with a saved run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
