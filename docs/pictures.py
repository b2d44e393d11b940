"""Draw the two pictures of README from a run: its report and the page of a category's neurons.

    python docs/pictures.py --run runs/demo    # or: make demo pictures

Both pages are written anew and photographed from the top by a headless chromium without a network.
What they show first of prompts and answers is one question whose answers the run's judge calls
harmless: look at the picture before it is committed. Other such text is folded further below.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1200
HEIGHTS = {"report": 1170, "neurons": 1170}
"""Pixels from the top: the report's conclusion, and the four maps of all neurons."""
LARGEST = 300_000
"""Bytes of a picture, at most, so that the repository stays small."""


def main(arguments: list[str] | None = None) -> None:
    """Write docs/images/report.png and docs/images/neurons.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/demo", help="folder of a finished run")
    parser.add_argument("--category", default="privacy_violation", help="whose neurons are shown")
    options = parser.parse_args(arguments)

    run = Path(options.run).resolve()
    workbench("report", "--run", str(run))
    workbench("neurons", "--run", str(run), "--category", options.category, "--quiet")
    pages = {
        "report": run / "report.html",
        "neurons": run / f"neurons_{options.category}.html",
    }
    IMAGES.mkdir(exist_ok=True)
    for name, page in pages.items():
        picture = IMAGES / f"{name}.png"
        photograph(page, picture, HEIGHTS[name])
        sys.stdout.write(f"{picture}\n")


def workbench(*arguments: str) -> None:
    """Run a command of workbench; one that fails ends this script with its message."""
    done = subprocess.run([sys.executable, "-m", "workbench", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def photograph(page: Path, picture: Path, height: int) -> None:
    """Save the top of a page as a picture.

    Raises:
        SystemExit: If there is no browser, it draws nothing, or the picture is too large.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser found ({', '.join(BROWSERS)}); install chromium.")
    with tempfile.TemporaryDirectory() as profile:
        new = Path(profile) / "picture.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}/profile",
            f"--window-size={WIDTH},{height}",
            "--virtual-time-budget=8000",  # milliseconds of the page's clock for its scripts
            f"--screenshot={new}",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        if not new.is_file():
            sys.exit(f"{browser} drew no picture of {page}.")
        if new.stat().st_size >= LARGEST:
            sys.exit(f"the picture of {page} has {new.stat().st_size} bytes, allowed: {LARGEST}.")
        shutil.move(new, picture)


if __name__ == "__main__":
    main()
