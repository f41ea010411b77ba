"""The photographs inside scikit-image's wheel: enough to train a small network, with some held out.

All are in the public domain or CC0 (scikit-image's documentation of `skimage.data` has their sources). Microscope
pictures, drawings, scans with few colours and pictures that scikit-image downloads are not among them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..imaging import ImageError

# The pair is two views of one scene; both are trained on, so that no held-out picture has been seen.
TRAIN = (
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "camera.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
    "moon.png",
    "page.png",
    "text.png",
    "clock_motion.png",
)
HELD_OUT = ("astronaut.png", "chelsea.png", "coffee.png")


def folder() -> Path:
    """Where scikit-image keeps them.

    Raises:
        ImageError: it is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ImageError("scikit-image, which has the photographs, is not installed; give pictures of your own")
    return Path(spec.origin).parent / "data"


def files(names: tuple[str, ...]) -> list[Path]:
    """The named photographs.

    Raises:
        ImageError: this release of scikit-image does not have one of them, or is not installed.
    """
    found = [folder() / name for name in names]
    missing = [f.name for f in found if not f.is_file()]
    if missing:
        raise ImageError(f"this release of scikit-image has no {', '.join(missing)} in {folder()}")
    return found
