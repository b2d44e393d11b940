"""Find the neurons and heads that carry a risk category, and check them causally.

What they read and write, how stable their ranking is, and whether silencing them matters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
