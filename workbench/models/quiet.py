"""Keep other libraries from writing to the terminal."""

from __future__ import annotations


class quiet_transformers:  # noqa: N801 - reads as a with-statement
    """Silence progress bars and notices of transformers inside the block.

    The user's own settings come back after it.
    """

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
