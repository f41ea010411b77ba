"""A training run as a picture, its loss and PSNR: python -m bench.training_plot RUN -o docs/training.svg"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from esr_kernels.plotting import save_figure
from esr_kernels.training.export import CARD
from esr_kernels.training.log import read


def main() -> None:
    """Draw `log.csv` of a run's folder, and bicubic interpolation's PSNR where the run is complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of esr-kernels train")
    parser.add_argument("-o", "--output", type=Path, required=True, help="an .svg or .png file")
    args = parser.parse_args()
    from matplotlib.figure import Figure

    rows = read(args.run / "log.csv")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "loss", "training loss"), (right, "psnr", "PSNR of held-out pictures [dB]")):
        points = [(float(r["seconds"]) / 60, float(r[key])) for r in rows if r[key]]
        axes.plot(*zip(*points, strict=True))
        axes.set_xlabel("minutes")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    card = args.run / CARD
    if card.is_file():
        values = [v["bicubic"] for v in json.loads(card.read_text(encoding="utf-8"))["psnr"].values()]
        mean = sum(values) / len(values)
        right.axhline(mean, linestyle="--", color="grey", label="bicubic")
        right.set_ylim(bottom=mean - 1)
        right.legend()
    save_figure(figure, args.output)


if __name__ == "__main__":
    main()
