"""The spectra of an inspection as a picture: one HTML file that loads nothing, one small chart a layer.

A chart shows the share of the variance (cumulative energy) against the share of directions, of the row space and of
the column space. The energy axis counts nines (0, 90, 99, 99.9, 99.99 %): what factoring cuts off is the last of it.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from ..device.files import write_whole
from ..errors import ConfigError
from ..inspection import Curve, Inspection, LayerUse

_SUFFIXES = (".html", ".htm")
_WIDTH, _HEIGHT = 260, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 250, 38, 152  # of the plot within a chart
_NINES = 4
_LEVELS = ((0.0, "0"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"))
_LONGEST_NAME = 34

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #ddd; --row: #0072b2; --column: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --faint: #444; --row: #56b4e9; --column: #f0903f; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
svg { width: 100%; font: 10px system-ui, sans-serif; fill: var(--ink); }
svg .name { font-weight: 600; font-size: 11px; }
svg line { stroke: var(--faint); }
svg line.even { stroke: var(--ink); stroke-dasharray: 3 3; }
svg polyline { fill: none; stroke-width: 1.8; }
.row { stroke: var(--row); } .column { stroke: var(--column); }
circle.row { fill: var(--row); } circle.column { fill: var(--column); }
b.row { color: var(--row); } b.column { color: var(--column); }
"""


def check(path: Path) -> None:
    """ConfigError where no picture could be written, before anything is measured."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"plot {path}", expected="a file that ends in .html", got=path.suffix or "no ending")
    if not path.parent.is_dir():
        raise ConfigError(f"plot {path}", expected="an existing folder", got=f"no folder {path.parent}")


def write(found: Inspection, path: Path) -> None:
    """Write the picture; a file that is there is replaced in one step."""
    write_whole(path, page(found))


def page(found: Inspection) -> str:
    """The HTML document; the same inspection gives the same text."""
    measured = [layer for layer in found.layers if layer.column_rank_99 is not None]
    charts = "\n".join(_chart(layer) for layer in measured)
    fixed = [layer for layer in found.layers if layer.fixed]
    alone = "".join(f"<li>{escape(layer.name)}: {escape(layer.fixed)}</li>" for layer in fixed)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Row and column spaces of {escape(found.model)}</title>
<style>{_STYLE}</style>
<h1>{escape(found.model)}</h1>
<p>{found.parameters:,} parameters, {found.macs / 1e6:,.1f} M multiply-accumulates, {found.samples} samples.
Share of the variance that the leading directions hold, against their share of all directions:
<b class="row">row space</b> (what a layer takes), <b class="column">column space</b> (what it gives). Dots: the ranks
that hold 99 and 99.9 %. Dashed: the break-even rank; factored below it, a layer has fewer parameters.</p>
<main>
{charts}
</main>
{f"<p>Left alone:</p><ul>{alone}</ul>" if alone else ""}
</html>
"""


def _chart(layer: LayerUse) -> str:
    name = layer.name if len(layer.name) <= _LONGEST_NAME else f"…{layer.name[1 - _LONGEST_NAME :]}"
    row = (layer.row_rank_99, layer.row_rank_999)
    column = (layer.column_rank_99, layer.column_rank_999)
    said = f"row {_ranks(row, layer.row_size)}, column {_ranks(column, layer.column_size)}"
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f'<text class="name" x="4" y="12">{escape(name)}<title>{escape(layer.name)}</title></text>',
        f'<text x="4" y="26">{escape(layer.kind)} {escape(layer.shape)}</text>',
        *_grid(),
        *([_break_even(layer)] if layer.break_even else []),
        *_space("row", layer.row_curve, row, layer.row_size),
        *_space("column", layer.column_curve, column, layer.column_size),
        f'<text x="4" y="{_HEIGHT - 10}">{said}</text>',
        "</svg>",
    ]
    return "\n".join(parts)


def _grid() -> list[str]:
    lines = []
    for energy, label in _LEVELS:
        y = _y(energy)
        lines.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        x = _x(share)
        lines.append(f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        lines.append(f'<text x="{x}" y="{_BOTTOM + 12}" text-anchor="middle">{share:.0%}</text>')
    return lines


def _break_even(layer: LayerUse) -> str:
    x = _x(min(1.0, layer.break_even / layer.column_size))
    title = f"<title>break-even rank: {layer.break_even} of {layer.column_size}</title>"
    return f'<line class="even" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}">{title}</line>'


def _space(name: str, curve: Curve, ranks: tuple[int | None, int | None], size: int) -> list[str]:
    """The curve of one space with a dot at each utilised rank; nothing for a space without variance."""
    if not curve:
        return []
    points = " ".join(f"{_x(rank / size)},{_y(energy)}" for rank, energy in ((0, 0.0), *curve))
    energies = dict(curve)
    dots = [
        f'<circle class="{name}" cx="{_x(rank / size)}" cy="{_y(energies[rank])}" r="2.5">'
        f"<title>{name} space: {rank} of {size} directions hold {share}</title></circle>"
        for rank, share in zip(ranks, ("99 %", "99.9 %"), strict=True)
        if rank is not None
    ]
    return [f'<polyline class="{name}" points="{points}"/>', *dots]


def _ranks(ranks: tuple[int | None, int | None], size: int) -> str:
    return "–" if ranks[0] is None else f"{ranks[0]}, {ranks[1]} of {size}"


def _x(share: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * share, 1)


def _y(energy: float) -> float:
    nines = min(float(_NINES), -math.log10(max(1.0 - energy, 10.0**-_NINES)))
    return round(_BOTTOM - (_BOTTOM - _TOP) * nines / _NINES, 1)
