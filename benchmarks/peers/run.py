"""README's table against other tools: `make bench-peers`, with `DFQ_DATA` naming real weights and images.

Each tool gets an environment of its own under `.venv-peers` (ONNX Runtime's quantizers run in ours) and, per row, a
process of its own, whose time and memory are measured. The float model is torch's plain ONNX export of timm's model. A
tool that cannot be installed or crashes is a row that says so. The 128 real images are those of `imagenet_calib`; all
files are judged by `measure.py` on `imagenet_val`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import dfq_deploy as dfq
from benchmarks.accuracy import WEIGHTS
from benchmarks.peers.rows import ROWS, PeerError, Row, results, table
from benchmarks.speed import machine_facts
from calibrators.files import written_whole
from calibrators.images import ImageSet
from dfq_deploy.models.loading import load_model
from dfq_deploy.opening import open_images

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_ENVIRONMENTS = _ROOT / ".venv-peers"
_OPSET = 20  # ONNX Runtime cannot load signed INT8 convolutions at 21
_MOST_SECONDS = 3600


def python_of(environment: str) -> Path:
    """The interpreter of an environment, which is made if it is not there or has other requirements.

    Raises:
        PeerError: It cannot be made.
    """
    if not environment:
        return Path(sys.executable)
    wanted, folder = _HERE / "requirements" / f"{environment}.txt", _ENVIRONMENTS / environment
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        print(f"making {folder.relative_to(_ROOT)}", flush=True)
        log = _ENVIRONMENTS / f"{environment}.log"
        _ENVIRONMENTS.mkdir(exist_ok=True)
        run([sys.executable, "-m", "venv", "--clear", folder], log)
        run([python, "-m", "pip", "install", "--requirement", wanted], log)
        stamp.write_text(wanted.read_text())
    return python


def run(command: list[str | Path], log: Path) -> None:
    """Run a command to its end, what it says going to `log`.

    Raises:
        PeerError: It failed, or took too long.
    """
    own = Path(command[0]) == Path(sys.executable)
    environment = os.environ | {"PYTHONPATH": str(_ROOT) if own else ""}
    with log.open("w") as file:
        try:
            ended = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,  # ModelOpt compiles something, and stumbles over the pyproject.toml of a checkout
                timeout=_MOST_SECONDS,
            )
        except subprocess.TimeoutExpired as cause:
            message = f"not done after {_MOST_SECONDS} s"
            raise PeerError(message) from cause
    if ended.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        message = said[-1] if ended.returncode > 0 else f"killed by signal {-ended.returncode}"
        raise PeerError(message)


class Subject:
    """One model: what the tools are given, and where their results go.

    Attributes:
        folder: Where all of it lies.
    """

    def __init__(self, name: str, folder: Path, data: Path, limit: int) -> None:
        self._name, self.folder, self._data, self._limit = name, folder, data, limit
        self._checkpoint = data / "weights" / WEIGHTS[name]
        self._float = folder / "float.onnx"
        self._judges, self._labels = folder / "judges.npy", folder / "labels.npy"
        self._images = {
            "real": folder / "real.npy",
            "noise": folder / "noise.npy",
            "synthetic": folder / "synthetic.safetensors",
        }

    def prepare(self) -> None:
        """Write the float model and the images that are not there yet; synthetic ones come with their first row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._float.exists():
            plain = timm.create_model(self._checkpoint.name.partition(".")[0], checkpoint_path=str(self._checkpoint))
            with written_whole(self._float) as temporary:
                torch.onnx.export(
                    plain.eval(),
                    (torch.zeros(2, *plain.default_cfg["input_size"]),),
                    str(temporary),
                    dynamo=True,
                    external_data=False,
                    opset_version=_OPSET,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    input_names=["images"],
                    output_names=["logits"],
                )
        if not self._images["noise"].exists():
            preprocess = load_model(self._name, checkpoint=self._checkpoint).preprocess
            real = open_images(f"folder:{self._data / 'imagenet_calib'}", preprocess)
            np.save(self._images["real"], real.pixels[: len(real)])
            judges = open_images(f"folder:{self._data / 'imagenet_val'}", preprocess).spread(self._limit)
            np.save(self._judges, judges.pixels[: len(judges)])
            np.save(self._labels, judges.labels)
            recipe = dfq.Recipe(model=self._name, checkpoint=self._checkpoint, generator="noise")
            noise: ImageSet = dfq.generate(recipe, self.folder / "noise.safetensors")
            np.save(self._images["noise"], noise.pixels[: len(noise)])

    def measure(self, row: Row) -> dict[str, Any]:
        """Let the row's tool do its work, and judge what it made.

        Raises:
            PeerError: It could not.
        """
        print(f"{self._name}: {row.key}", flush=True)
        made_file = self.folder / f"{row.key}.onnx"
        images = self._images[row.images] if row.images else None
        generated = self._generated() if row.images == "synthetic" else None
        found = self._tool(row.environment, row.script, row.option, images, made_file)
        if generated:
            found |= {f"generating_{clock}": generated[clock] for clock in ("seconds", "cpu_seconds")}
            found["peak_mib"] = max(found["peak_mib"], generated["peak_mib"])
        judged = made_file.with_suffix(".judged.json")
        command = [
            *(sys.executable, _HERE / "measure.py", "--float-onnx", self._float, "--quantized", made_file),
            *("--images", self._judges, "--labels", self._labels, "--facts", judged),
        ]
        run(command, judged.with_suffix(".log"))
        return found | json.loads(judged.read_text())

    def caption(self) -> str:
        """The model, and what float makes of it."""
        labels = np.load(self._labels)
        kept = self._float.with_name("float-logits.npy")  # by `measure.py`; not there if every tool failed
        hits = f"top-1 {100 * (np.load(kept).argmax(1) == labels).mean():.2f}, " if kept.exists() else ""
        return f"{self._name}, {len(labels)} images; float: {hits}{self._float.stat().st_size / 2**20:.1f} MiB"

    def _generated(self) -> dict[str, Any]:
        """Time and memory of making the synthetic images, which happens once."""
        out = self._images["synthetic"]
        kept = out.with_suffix(".json")
        if not (out.exists() and kept.exists()):
            return self._tool("", "ours", "images", None, out)
        found: dict[str, Any] = json.loads(kept.read_text())
        return found

    def _tool(self, environment: str, script: str, option: str, images: Path | None, out: Path) -> dict[str, Any]:
        facts = out.with_suffix(".json")
        command: list[str | Path] = [
            *(python_of(environment), _HERE / "tools" / f"{script}.py", "--float-onnx", self._float),
            *("--name", self._name, "--checkpoint", self._checkpoint, "--option", option),
            *("--out", out, "--facts", facts),
        ]
        run([*command, *(("--images", images) if images else ())], out.with_suffix(".log"))
        found: dict[str, Any] = json.loads(facts.read_text())
        return found


def main() -> None:
    """Measure what is not there yet, and write table.md and peers.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all results; they are kept")
    parser.add_argument("--models", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=[], help="measure these, there or not")
    parser.add_argument("--limit", type=int, default=10**6, help="judge on so many images, from the first run on")
    args = parser.parse_args()
    data, out = Path(os.environ["DFQ_DATA"]).resolve(), args.out.resolve()
    everything: dict[str, Any] = {"machine": machine_facts()}
    tables = []
    for model in args.models:
        subject = Subject(model, out / model, data, args.limit)
        subject.prepare()
        rows = [ROWS[key] for key in args.rows] or list(ROWS.values())
        results(rows, subject.folder / "rows", subject.measure, again=args.rows)
        measured = [row for row in ROWS.values() if (subject.folder / "rows" / f"{row.key}.json").exists()]
        everything[model] = results(measured, subject.folder / "rows", subject.measure)
        tables.append(f"{subject.caption()}\n\n{table(everything[model])}\n")
        (out / "table.md").write_text("\n".join(tables))
    (out / "peers.json").write_text(json.dumps(everything, indent=1))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
