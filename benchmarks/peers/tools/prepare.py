"""What ONNX Runtime's documentation asks for before its quantizers, and so before Optimum, which calls them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.quantization.shape_inference import quant_pre_process
from peer import Job


@contextmanager
def prepared(job: Job) -> Iterator[Path]:
    """The float model after `quant_pre_process`, alone in a folder that is gone afterwards."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        quant_pre_process(job.float_onnx, path)
        yield path
