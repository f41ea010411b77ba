"""`python -m python_models`: the table of the networks in README.md."""

from __future__ import annotations

from . import card, list_models


def table() -> str:
    """All networks as Markdown, in the order of `list_models`."""
    lines = [
        "| name | network | team, report section | parameters | FLOPs at 256x256 | run time of Table 1 |",
        "|---|---|---|--:|--:|--:|",
    ]
    for name in list_models():
        c = card(name)
        team = c.team if c.section is None else f"{c.team}, {c.section}"
        runtime = "" if c.table1 is None else f"{c.table1['runtime_ms']:.2f} ms"
        lines.append(f"| `{name}` | {c.title} | {team} | {c.parameters:,} | {c.flops / 1e9:.3f} G | {runtime} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
