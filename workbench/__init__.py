"""Interpretability workbench for safety steering: SafeSteer on hooked transformers.

The names used most are here (``import workbench as wb``); the rest is one dot away, in the folder
it belongs to (``wb.neurons``, ``wb.judges``, ``wb.figures``, ...). ``__init__.pyi`` lists them.
A module is imported when a name of it is first used, so importing the package does not load torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
