"""Published checkpoints by the name of their model."""

from __future__ import annotations

from pathlib import Path

import python_models


def nearby() -> Path:
    """Where published checkpoints lie beside the repository, on machines that have them."""
    return Path(__file__).resolve().parents[3] / "shared" / "models" / "weights"


def published(name: str, folder: Path | None = None) -> Path | None:
    """A model's published checkpoint, by the number of its team; None where there is none.

    Args:
        name: in `python_models`.
        folder: with the files under their published names; None: `nearby`.
    """
    folder = nearby() if folder is None else folder
    # Of two the one that was ranked comes first.
    return min(folder.glob(f"team{python_models.card(name).team_id:02d}_*"), default=None)
