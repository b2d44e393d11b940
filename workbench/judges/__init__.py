"""Judge the text of answers: verdicts, numbers, and how far a judge can be trusted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
