"""The result of a run: weights in deploy form and a card that says where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from ..files import atomically
from ..timing import machine, machine_line, write_json
from .evaluate import BORDER, bicubic_psnr, validate

if TYPE_CHECKING:
    from .trainer import Trainer

WEIGHTS, CARD, PAGE = "model.safetensors", "model.json", "model.md"


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict as safetensors, completely or not at all."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    content = save(tensors, dict(metadata))
    atomically(path, lambda part: part.write_bytes(content))


def export(trainer: Trainer) -> dict[str, Any]:
    """Write the weights, the card as JSON and as Markdown into the run's folder; returns the card."""
    model, config, process = trainer.result(), trainer.config, trainer.process
    values = validate(model, trainer.held_out, trainer.scale, process)
    if not process.first:
        return {}
    plain = bicubic_psnr(trainer.held_out, trainer.scale)
    names = [trainer.held_out.name(i) for i in range(len(trainer.held_out))]
    card: dict[str, Any] = {
        "model": config.model.name,
        "options": model.options,
        "scale": trainer.scale,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_on": sorted({trainer.train_pictures.name(i) for i in range(len(trainer.train_pictures))}),
        "from": Path(config.model.weights).name or "random weights",
        "iterations": trainer.steps,
        "patches": trainer.samples,
        "seconds": round(trainer.seconds),
        "machine": machine_line(machine()),
        "settings": config.decisive(),
        "psnr": {
            n: {"network": round(a, 3), "bicubic": round(b, 3)} for n, a, b in zip(names, values, plain, strict=True)
        },
    }
    save_tensors(
        trainer.folder / WEIGHTS, model.state_dict(), {"model": config.model.name, "scale": str(trainer.scale)}
    )
    write_json(trainer.folder / CARD, card)
    atomically(trainer.folder / PAGE, lambda part: part.write_text(page(card), encoding="utf-8"))
    trainer.say(f"written   {trainer.folder / WEIGHTS}, {CARD}, {PAGE}")
    return card


def page(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    trained = card["trained_on"]
    which = ", ".join(trained) if len(trained) <= 30 else f"{', '.join(trained[:3])}, ..."
    stages = [
        f"- stage {s['name']}: {s['iterations'] * s['repeat']} iterations, batches of {s['batch']} patches of "
        f"{s['patch']} pixels, rate {s['rate']:g} ({s['schedule']['name']}), loss {s['loss']}"
        if s["iterations"]
        else f"- stage {s['name']}: the mean of {', '.join(s['average'])}"
        for s in card["settings"]["stage"]
    ]
    lines = [
        f"# {card['model']} x{card['scale']}",
        "",
        f"{card['parameters']:,} parameters, trained from {card['from']} on {len(trained)} pictures ({which}) for "
        f"{card['iterations']} iterations ({card['patches']} patches) in {card['seconds'] / 60:.0f} minutes on: "
        f"{card['machine']}.",
        "",
        *stages,
        "",
    ]
    psnr = card["psnr"]
    if psnr:
        gains = [v["network"] - v["bicubic"] for v in psnr.values()]
        lines += [
            f"PSNR [dB] of 8-bit RGB without a border of {BORDER} pixels, on pictures that were held out:",
            "",
            "| picture | bicubic | network | gain |",
            "|---|---|---|---|",
            *(
                f"| {n} | {v['bicubic']:.2f} | {v['network']:.2f} | {v['network'] - v['bicubic']:+.2f} |"
                for n, v in psnr.items()
            ),
            f"| mean | {_mean(psnr, 'bicubic'):.2f} | {_mean(psnr, 'network'):.2f} | {sum(gains) / len(gains):+.2f} |",
            "",
        ]
    return "\n".join(lines)


def _mean(psnr: Mapping[str, Mapping[str, float]], key: str) -> float:
    return sum(v[key] for v in psnr.values()) / len(psnr)
