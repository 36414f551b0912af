"""What a person sees of a sensitivity analysis."""

from typing import TYPE_CHECKING

from rich.table import Table

from dfq_deploy.showing.console import console, decibels

if TYPE_CHECKING:
    from dfq_deploy.analysis import Sensitivity
    from dfq_deploy.sparing import Massive

__all__ = ["print_sensitivity"]

_ROWS = 20  # of layers that hurt; what they leave out is counted below them
_FEW = 3  # spared layers named per reason


def print_sensitivity(found: "Sensitivity") -> None:
    """A sensitivity analysis: the layers that hurt most, those that stay float, and massive activations."""
    table = Table(title=f"{found.n} images, {found.images}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("alone\ndB", "its sites\ndB", "= float\n%", "noise\n%", "spared\ndB", "\n%", "MACs\n%"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers[:_ROWS]:
        table.add_row(
            layer.name,
            decibels(layer.alone.sqnr_db),
            " / ".join(decibels(effect.sqnr_db) for effect in layer.sites.values()),
            f"{layer.alone.agreement.percent:.1f}",
            f"{layer.noise_percent:.1f}",
            f"{layer.gain_db:+.2f}",
            f"{layer.others.agreement.percent - found.whole.agreement.percent:+.1f}",
            f"{layer.macs_percent:.1f}",
        )
    console.print(table)
    kinds = dict.fromkeys(" / ".join(site.rpartition(".")[2] for site in layer.sites) for layer in found.layers)
    if rest := found.layers[_ROWS:]:
        console.print(f"{len(rest)} more layers make {sum(layer.noise_percent for layer in rest):.1f} % of the noise")
    console.print("alone, = float: SQNR and top-1 agreement when it is all that is quantized; spared: gain of both")
    console.print(f"its sites: {', '.join(kinds)}, each alone; MACs: share of the model's multiply-accumulates")
    whole, share = found.whole, found.whole.agreement
    console.print(
        f"all {len(found.layers)} layers: {decibels(whole.sqnr_db)} dB, {share.percent:.1f} % as float "
        f"({share.low:.1f} to {share.high:.1f}); each alone and added up: {decibels(found.summed_db)} dB"
    )
    _print_spared(found)
    _print_massive(found)


def _print_spared(found: "Sensitivity") -> None:
    """The layers that stay float, by reason, with what quantizing them would cost; the worst are named."""
    for reason in dict.fromkeys(layer.reason for layer in found.spared):
        layers = [layer for layer in found.spared if layer.reason == reason]
        console.print(f"stays float: {reason}")
        costs = sorted((layer.alone.sqnr_db, layer.macs_percent, layer.name) for layer in layers if layer.alone)
        for sqnr_db, macs, name in costs[:_FEW]:
            console.print(f"  {name} ({macs:.1f} % of MACs): alone it would give {decibels(sqnr_db)} dB")
        if costs[_FEW:]:
            console.print(f"  {len(costs) - _FEW} more: {decibels(costs[_FEW][0])} to {decibels(costs[-1][0])} dB")
        if unknown := [layer.name for layer in layers if layer.alone is None]:
            console.print(f"  {_counted(unknown)}: not measured: no ranges for it in work/, or no format fits")


def _print_massive(found: "Sensitivity") -> None:
    """Where massive activations are; places with the same channels in one line."""
    groups: dict[tuple[bool, tuple[int, ...]], list[Massive]] = {}
    for massive in found.massive:
        groups.setdefault((massive.stream, tuple(massive.channels)), []).append(massive)
    console.print("massive activations, found on noise:" if groups else "massive activations: none, on noise")
    for (stream, _), places in groups.items():
        names = _counted([massive.place for massive in places])
        worst = max(places, key=lambda massive: massive.largest)
        console.print(
            f"  {f'residual stream at {names}' if stream else names}: {'it' if stream else 'its input'} {worst}"
        )


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
