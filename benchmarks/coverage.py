"""What of timm works: `make coverage` writes docs/coverage.md.

A row is the smallest member of one family, with random weights, norms and biases among them. It is exported in W8A8 for
ONNX Runtime and checked, and built for TensorRT for RTX, which needs no GPU; or it is refused, and the row says why.
Each runs in a process of its own and leaves a JSON file, so that a run that was cut off goes on where it was. The tests
run a tenth of the rows, another one for each commit.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import dfq_deploy as dfq
from calibrators.errors import DeployError
from calibrators.files import write_json, write_text
from calibrators.sites import sites_of
from dfq_deploy.machine import versions_of
from dfq_deploy.models.loading import model_of
from exporters.bundle import open_bundle

__all__ = ["ROWS", "measure", "page", "tenth"]

_MOST_SECONDS = 1800
_COUNT = 8  # images; six are the fewest that can decide
_VERSIONS = ("dfq-deploy", "timm", "torch", "onnx", "onnxruntime", "tensorrt-rtx-cu13")

ATTENTION = {
    "BEiT": "beit_base_patch16_224",
    "BEiT v2": "beitv2_base_patch16_224",
    "BEiT-3": "beit3_base_patch16_224",
    "BoTNet": "botnet26t_256",
    "CaFormer": "caformer_s18",
    "CaiT": "cait_xxs24_224",
    "CLIP ResNet": "resnet50_clip",
    "CLIP ViT": "vit_base_patch32_clip_224",
    "CoaT": "coat_tiny",
    "CoAtNet": "coatnet_pico_rw_224",
    "ConViT": "convit_tiny",
    "CPUBone": "cpubone_nano",
    "CrossViT": "crossvit_tiny_240",
    "CSATv2": "csatv2",
    "DaViT": "davit_tiny",
    "DeepSeek ViT": "deepseek_vit_412m",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT III": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv3": "vit_tiny_patch16_dinov3_qkvb",
    "EdgeNeXt": "edgenext_xx_small",
    "EfficientFormer": "efficientformer_l1",
    "EfficientFormer v2": "efficientformerv2_s0",
    "EfficientViM": "efficientvim_m1",
    "EfficientViT (MIT)": "efficientvit_b0",
    "EfficientViT (MSRA)": "efficientvit_m0",
    "EVA": "eva_large_patch14_196",
    "EVA-02": "eva02_tiny_patch14_336",
    "FastViT": "fastvit_sa12",
    "FlexiViT": "flexivit_small",
    "FocalNet": "focalnet_tiny_srf",
    "GC ViT": "gcvit_xxtiny",
    "Gemma 4 ViT": "gemma4_vit_167m",
    "HaloNet": "halonet26t",
    "Hiera": "hiera_tiny_224",
    "Hiera of SAM 2": "sam2_hiera_tiny",
    "iFormer": "iformer_t",
    "LambdaResNet": "lambda_resnet26t",
    "LeViT": "levit_128s",
    "LeViT, convolutional": "levit_conv_128s",
    "LowFormer": "lowformer_b0",
    "MaxViT": "maxvit_pico_rw_256",
    "MaxxViT": "maxxvit_rmlp_nano_rw_256",
    "MobileNet v4, hybrid": "mobilenetv4_hybrid_medium_075",
    "MobileNet v5": "mobilenetv5_300m",
    "MobileViT": "mobilevit_xxs",
    "MobileViT v2": "mobilevitv2_050",
    "MViT v2": "mvitv2_tiny",
    "NaFlexViT": "naflexvit_base_patch16_gap",
    "NesT": "nest_tiny",
    "Next-ViT": "nextvit_small",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384",
    "PiT": "pit_ti_224",
    "PVT v2": "pvt_v2_b0",
    "Qwen3 ViT": "qwen3_vit_88m",
    "SAM ViT": "samvit_base_patch16_224",
    "SHViT": "shvit_s1",
    "SigLIP": "vit_base_patch16_siglip_224",
    "SwiftFormer": "swiftformer_xs",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin S3": "swin_s3_tiny_224",
    "Swin v2": "swinv2_tiny_window8_256",
    "Swin v2 (CR)": "swinv2_cr_tiny_224",
    "TinyViT": "tiny_vit_5m_224",
    "TNT": "tnt_s_patch16_224",
    "Twins-PCPVT": "twins_pcpvt_small",
    "Twins-SVT": "twins_svt_small",
    "Visformer": "visformer_tiny",
    "ViT": "vit_tiny_patch16_224",
    "ViT, hybrid": "vit_tiny_r_s16_p8_224",
    "ViT, relative positions": "vit_relpos_small_patch16_224",
    "ViT, rotary positions": "vit_small_patch16_rope_mixed_224",
    "ViTamin": "vitamin_small_224",
    "VOLO": "volo_d1_224",
    "XCiT": "xcit_nano_12_p16_224",
}
CNNS = {
    "ConvNeXt": "convnext_atto",
    "EfficientNet": "efficientnet_b0",
    "MobileNet v3": "mobilenetv3_small_050",
    "RegNet": "regnetx_002",
    "RepViT": "repvit_m0_9",
    "ResNet": "resnet18",
}
ROWS = ATTENTION | CNNS
# Five minutes and more each: by hand only.
_LONG = ("DeepSeek ViT", "Gemma 4 ViT", "Hiera of SAM 2", "MobileNet v5", "Qwen3 ViT")


def measure(model: str, folder: Path) -> dict[str, Any]:
    """The numbers of one row, or the error that refuses it; `folder` is emptied afterwards."""
    try:
        return _measured(model, folder)
    except DeployError as error:
        return {"what": error.what, "why": error.why, "fix": error.fix}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(model: str, folder: Path) -> dict[str, Any]:
    asked = {"model": model, "random_weights": True, "generator": "noise", "count": _COUNT, "refine": "none"}
    recipe = dfq.Recipe(**asked, spare="massive")
    loaded = model_of(recipe)
    facts = {
        "parameters": sum(parameter.numel() for parameter in loaded.module.parameters()),
        "size": list(loaded.preprocess.size),
        "sites": len(sites_of(loaded.module)),
        "operands": sum(site.role == "operand" for site in sites_of(loaded.module).values()),
    }
    found = dfq.export(recipe, folder)
    counts = found.engine.census.counts
    return facts | {
        "parity": open_bundle(folder).float_parity,
        "layers": counts,
        "verdict": found.verdict,
        "reason": found.reason,
        "floor_ratio": list(found.floor_ratio),
        "agreement": found.agreement["engine_reference"].percent,
        "floor": found.agreement["noise_floor"].percent,
        "layer_error": max(found.layer_error.values()),
        "rtx": _rtx(dfq.Recipe(**asked, spare="massive", backend="rtx", target="sm89"), folder),
    }


def _rtx(recipe: dfq.Recipe, folder: Path) -> dict[str, Any]:
    """What comes of a build for TensorRT for RTX, from the stages that are there already."""
    try:
        found = dfq.export(recipe, folder, limit=1)
    except DeployError as error:
        return {"what": error.what, "why": error.why, "fix": error.fix}
    return {"state": found.engine.state, "layers": found.engine.census.counts, "note": found.engine.note}


def _row(model: str, folder: Path, path: Path) -> None:
    found = measure(model, folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_mib": used.ru_maxrss >> 10}
    write_json(path, found | facts | {"date": date.today().isoformat(), "versions": versions_of(_VERSIONS)})


def results(rows: Mapping[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """The numbers of `rows` by family, those that `folder` has taken from there."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported for every row
    found = {}
    for family, model in rows.items():
        path = folder / f"{model}.json"
        if not path.exists():
            process = context.Process(target=_row, args=(model, folder / model, path))
            process.start()
            process.join(_MOST_SECONDS)
            late = process.is_alive()
            process.kill()
            process.join()
            if not path.exists():
                ended = f"it took more than {_MOST_SECONDS} s" if late else f"the process ended with {process.exitcode}"
                write_json(path, {"what": "the row could not be measured.", "why": f"{ended}.", "fix": ""})
        found[family] = json.loads(path.read_text(encoding="utf-8"))
        print(model, found[family].get("verdict") or found[family]["why"], flush=True)
    return found


def tenth(commit: str) -> dict[str, str]:
    """The rows that belong to a commit, by its hash in hexadecimal digits; none of the long ones."""
    short = [(family, model) for family, model in ROWS.items() if family not in _LONG]
    return dict(short[int(commit, 16) % 10 :: 10])


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by family as the page of the documentation."""
    notes: list[str] = []
    lines = [_line(family, found[family], notes) for family in ROWS]
    head = "| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS)
    done = {family: row for family, row in found.items() if row.get("verdict") in ("pass", "undecided")}
    built = sum(row["rtx"].get("state") == "built" for row in done.values())
    with_attention, cnns = (sum(family in done for family in group) for group in (ATTENTION, CNNS))
    failed, open_ = (sum(row.get("verdict") == word for row in found.values()) for word in ("fail", "undecided"))
    dates = sorted(row["date"] for row in found.values() if "date" in row)
    versions = ", ".join(f"{name} {found[next(iter(found))]['versions'].get(name, '-')}" for name in _VERSIONS)
    return _PAGE.format(
        counts=f"{with_attention} of {len(ATTENTION)} families with attention "
        f"({with_attention / len(ATTENTION):.1%}) and {cnns} of {len(CNNS)} CNNs export and check "
        f"({open_} of them undecided), {failed} fail; "
        f"{built} build for TensorRT for RTX",
        made=f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {versions}",
        count=_COUNT,
        table="\n".join([head, *lines]),
        notes="\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)),
    )


_COLUMNS = ("family", "model", "image", "M", "sites", "parity", "INT8 + float", "engine", "floors", "top-1", "RTX", "s")
_PAGE = """# Coverage of timm

<!-- Written by `make coverage`. -->

{counts}.

Each row is the smallest member of a family, with random weights, norms and biases among them, so that nothing rests on
one that is 0 or 1: what works here is the pipeline, and of accuracy the table says nothing. A row is

    dfq-deploy export --model NAME --random-weights --generator noise --count {count} --refine none --spare massive

with `--backend ort`, checked on the images that it was calibrated on, and once more with `--backend rtx --target sm89`,
which builds the engine with no GPU and has not run it. One thread; CI runs a tenth of the rows on every push, another
one for each commit, but for five that take five minutes and more; `make coverage` runs all. Measured:
{made}.

*Image* is height x width, *M* millions of parameters, *sites* how many places can be quantized, *parity* how far the
float ONNX model is from torch, relative to the largest value that it puts out. *INT8 + float* counts layers. *Floors*
is the engine's distance from its reference over the reference's from itself when its input moves by 1e-6, with its
interval; an engine is *undecided* where 2 lies within. *Top-1* is how often engine and reference agree, in percent.
*RTX* counts the layers that the built engine computes in INT8. *s* is seconds of CPU time for the whole row.

{table}

Notes:

{notes}
"""


def _line(family: str, row: Mapping[str, Any], notes: list[str]) -> str:
    cells = [family, f"`{ROWS[family]}`"]
    if "verdict" in row:
        value, low, high = row["floor_ratio"]
        layers = dict(row["layers"])
        quantized = layers.pop("int8", 0)
        rtx = row["rtx"]
        cells += [
            "x".join(map(str, row["size"])),
            f"{row['parameters'] / 1e6:.1f}",
            str(row["sites"]),
            f"{row['parity']:.0e}",
            f"{quantized} + {sum(layers.values())}",
            row["verdict"],
            f"{value:.1f} ({low:.1f} to {high:.1f})",
            f"{row['agreement']:.0f}",
            f"{rtx['layers']['int8']} INT8" if rtx.get("state") == "built" else f"no{_note(rtx, notes)}",
        ]
    else:
        cells += [*[""] * 5, f"{'refused' if row['fix'] else 'not measured'}{_note(row, notes)}", *[""] * 3]
    return f"| {' | '.join([*cells, str(round(row.get('cpu_seconds', 0)))])} |"


def _note(error: Mapping[str, Any], notes: list[str]) -> str:
    """A reference to what is told below the table."""
    said = " ".join(str(error[part]) for part in ("what", "why", "note") if error.get(part))
    said = " ".join(said.split()).replace("|", "\\|")
    if said not in notes:
        notes.append(said)
    return f" ({notes.index(said) + 1})"


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of one JSON file per row")
    parser.add_argument("models", nargs="*", help="only these")
    options = parser.parse_args()
    rows = {family: model for family, model in ROWS.items() if not options.models or model in options.models}
    found = results(rows, options.out)
    if len(found) == len(ROWS):
        write_text(Path("docs/coverage.md"), page(found))


if __name__ == "__main__":
    main()
