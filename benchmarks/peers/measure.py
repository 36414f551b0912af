"""What one quantized ONNX file is worth: accuracy, agreement with float, size and time, all in ONNX Runtime here.

Every tool's file is judged by this one program, on the same images with the same preprocessing, in sessions with the
same options and one thread. Float and quantized model take turns call by call, so that what else the machine does hits
both.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

from exporters.ort_engine import session_options

_BATCH = 8
_CALLS = {1: 40, 8: 12}
_WARM_UP = 3


def session(path: Path) -> onnxruntime.InferenceSession:
    """A session on one core."""
    options = session_options()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_of(model: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Logits of all images."""
    starts = range(0, len(images), _BATCH)
    return np.concatenate([model.run(None, {"images": images[start : start + _BATCH]})[0] for start in starts])


def times_of(models: list[onnxruntime.InferenceSession], images: np.ndarray, calls: int) -> np.ndarray:
    """Milliseconds of each call of each model, (calls, models)."""
    times = np.zeros((_WARM_UP + calls, len(models)))
    for call in range(len(times)):
        for which, model in enumerate(models):
            start = time.perf_counter()
            model.run(None, {"images": images})
            times[call, which] = 1000 * (time.perf_counter() - start)
    return times[_WARM_UP:]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for path in ("float-onnx", "quantized", "images", "labels", "facts"):
        parser.add_argument(f"--{path}", type=Path, required=True)
    args = parser.parse_args()
    images, labels = np.load(args.images, mmap_mode="r"), np.load(args.labels)
    models = [session(path) for path in (args.float_onnx, args.quantized)]
    kept = args.float_onnx.with_name("float-logits.npy")
    if not kept.exists():
        np.save(kept, logits_of(models[0], images))
    wanted, found = np.load(kept), logits_of(models[1], images)
    facts = {
        "n": len(images),
        "top1": 100 * float((found.argmax(1) == labels).mean()),
        "agreement": 100 * float((found.argmax(1) == wanted.argmax(1)).mean()),
        "mib": args.quantized.stat().st_size / 2**20,
    }
    for batch, calls in _CALLS.items():
        times = times_of(models, images[:batch], calls)
        facts[f"speed_up_{batch}"] = float(np.median(times[:, 0] / times[:, 1]))
        facts[f"float_ms_{batch}"], facts[f"ms_{batch}"] = (float(v) for v in np.median(times, axis=0))
    args.facts.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
