"""How large: `make bench`. Peak memory of each stage as a process of its own, as JSON; Linux only, needs no download.

Calibration is measured with 32 and with 512 images: its memory must not grow with their number. Weights are random:
memory does not depend on their values.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

# The kernel's high-water mark of the process itself; getrusage's would count the memory of whoever started it.
PROGRAM = """
import pathlib, re, sys
from dfq_deploy.cli import run
code = run(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def peak_mib(*arguments: str) -> float:
    """Peak resident memory of one `dfq-deploy` process, MiB."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    if ended.returncode not in (0, 2):
        message = f"dfq-deploy {' '.join(arguments)} ended with {ended.returncode}: {ended.stderr[-500:]}"
        raise RuntimeError(message)
    return int(ended.stdout.split()[-1]) / 1024


def main() -> None:
    """Measure all stages of DeiT-T, the images kept in files between them, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out: Path = parser.parse_args().out
    model = ("--model", "deit_t", "--random-weights")
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = {count: str(folder / f"noise-{count}.safetensors") for count in (32, 512)}
        stages = {
            "generate": ("generate", *model, "--out", str(folder / "images.safetensors")),
            "generate noise": ("generate", *model, "--generator", "noise", "--out", noise[32]),
            "generate noise 512": ("generate", *model, "--generator", "noise", "--count", "512", "--out", noise[512]),
            "calibrate 32": ("calibrate", *model, "--calib", noise[32], "--out", str(folder / "a" / "plan")),
            "calibrate 512": ("calibrate", *model, "--calib", noise[512], "--out", str(folder / "b" / "plan")),
            "export": ("export", *model, "--calib", noise[32], "--out", str(folder / "bundle")),
            "check": ("check", str(folder / "bundle")),
            "infer": ("infer", str(folder / "bundle"), str(folder / "image.png")),
        }
        (folder / "image.png").write_bytes(_image())
        for stage, arguments in stages.items():
            peaks[stage] = peak_mib(*arguments)
            print(f"{stage}: {peaks[stage]:.0f} MiB", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(peaks, indent=1))
    print(f"written to {out}")


def _image() -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (300, 200)).save(file, "PNG")
        return file.getvalue()


if __name__ == "__main__":
    main()
