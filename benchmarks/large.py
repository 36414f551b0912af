"""How cost grows with the model: `make large`. Time and peak memory over ViT-T, S, B, L and H, as JSON and a chart.

Each stage is measured, and what is fixed of both and the power of the number of parameters that the rest grows with are
said; Linux only, needs no download. Each model is exported in a process of its own, with random weights and a few noise
images; what else is on the command line goes to that export. A model that the JSON has already is not run again.
Weights are random: neither time nor memory depends on their values.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from scipy.optimize import curve_fit

from dfq_deploy.charts.saving import save

MODELS = {
    "ViT-T": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
    "ViT-H": "vit_huge_patch14_clip_224.laion2b_ft_in12k_in1k",  # vit_huge_patch14_224 has no classifier
}


def parameters_of(name: str) -> int:
    """How many parameters a timm model has, without having them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def cost_of(name: str, count: int, flags: list[str]) -> dict[str, Any]:
    """Export a model and return what it took, and what came out."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--model", name, "--random-weights", "--generator", "noise", "--count", str(count), "--out", folder]
        command = [sys.executable, "-m", "dfq_deploy", "export", *asked, *flags]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode not in (0, 2):
            message = f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-500:]}"
            raise RuntimeError(message)
        report = json.loads((Path(folder) / "report.json").read_text())
        sizes = {kind: sum(map(_size, Path(folder).glob(f"{kind}*"))) for kind in ("work/float-", "model.onnx")}
    stages = report["stages"]
    return {
        "parameters": parameters_of(name),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_mib": max(stage["peak_mib"] for stage in stages.values()),
        "stages": stages,
        "float_bytes": sizes["work/float-"],
        "engine_bytes": sizes["model.onnx"],
        "verdict": report["verdict"],
        "images": count,
        "flags": flags,
    }


def growth(costs: Mapping[str, Mapping[str, Any]], what: str) -> tuple[float, float, float]:
    """Fixed cost, cost per million parameters and exponent that fit best, by least squares of relative errors."""
    millions = np.array([cost["parameters"] / 1e6 for cost in costs.values()])
    values = np.array([cost[what] for cost in costs.values()])
    guess = (values.min() / 2, values.max() / millions.max(), 1)
    (fixed, factor, exponent), _ = curve_fit(_cost, millions, values, guess, values, bounds=(0, np.inf))
    return float(fixed), float(factor), float(exponent)


def _cost(millions: Any, fixed: float, factor: float, exponent: float) -> Any:
    return fixed + factor * millions**exponent


def draw(costs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw time and peak memory over the number of parameters, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, what, label, scale in zip(
        panels, ("seconds", "peak_mib"), ("seconds", "peak memory, GiB"), (1, 1024), strict=True
    ):
        fixed, factor, exponent = growth(costs, what)
        millions = np.array([cost["parameters"] / 1e6 for cost in costs.values()])
        axes.loglog(millions, [cost[what] / scale for cost in costs.values()], "o", color="tab:blue")
        along = np.geomspace(millions.min(), millions.max())
        label_of_fit = f"{fixed / scale:.3g} + {factor / scale:.2g} M$^{{{exponent:.2f}}}$"
        axes.loglog(along, _cost(along, fixed, factor, exponent) / scale, "--", color="0.5", label=label_of_fit)
        for name, cost in costs.items():
            axes.annotate(name, (cost["parameters"] / 1e6, cost[what] / scale), (4, -11), textcoords="offset points")
        axes.set_xlabel("M, millions of parameters")
        axes.set_ylabel(label)
        axes.margins(0.1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    """Measure, write the JSON after each model, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of large.json and large.svg")
    parser.add_argument("--models", default=",".join(MODELS), help="which of them")
    parser.add_argument("--count", type=int, default=4, help="number of noise images")
    args, flags = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "large.json"
    costs: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.models.split(","):
        if name not in costs:
            costs[name] = cost_of(MODELS[name], args.count, flags)
            kept.write_text(json.dumps(costs, indent=1))
        found = costs[name]
        print(f"{name}: {found['seconds']:.0f} s, {found['peak_mib']:.0f} MiB, {found['verdict']}", flush=True)
    if len(costs) == len(MODELS):
        for what in ("seconds", "peak_mib"):
            fixed, factor, exponent = growth(costs, what)
            print(f"{what}: {fixed:.3g} + {factor:.3g} * (millions of parameters) ** {exponent:.2f}")
        weights = [4 * cost["parameters"] / 2**20 for cost in costs.values()]
        slope, rest = np.polyfit(weights, [cost["peak_mib"] for cost in costs.values()], 1)
        print(f"peak memory: {slope:.2f} times the float weights, and {rest:.0f} MiB")
        draw(costs, args.out / "large.svg")


def _size(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    main()
