"""One run, described: every field is a flag of the command line and a key of a TOML file (see `recipe_file`).

The classes build on one another as the stages do. They are checked once, here; the rest of the code trusts them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calibrators.errors import CalibrationWarning, RecipeError
from calibrators.registry import names
from calibrators.scheme import SCHEMES
from dfq_deploy.generation import BATCH
from dfq_deploy.generation.generators import STUDENTS
from exporters.backends import BuildOptions

__all__ = [
    "AuditRecipe",
    "BackendName",
    "CalibrateRecipe",
    "DeviceName",
    "GenerateRecipe",
    "ModelRecipe",
    "ProviderName",
    "Recipe",
    "SimulateRecipe",
    "note_unused",
    "size_of",
]

_OBSERVERS = ("auto", "minmax", "percentile", "entropy", "mse", "hessian")
_PROVIDERS = ("cpu", "cuda", "tensorrt", "rtx")
_FLOATS = ("fp32", "fp16", "bf16")
_SOFTMAXES = ("log2", "even")
_DEVICES = ("auto", "cpu", "cuda")
_LEAST = ("latency", "size")
_BLOCKS = (16, 32, 64, 128)

if TYPE_CHECKING:  # the choices are what lies in the plugin folders, which a type checker cannot know
    from builtins import int as BlockSize
    from builtins import str as BackendName
    from builtins import str as CollectorName
    from builtins import str as DeviceName
    from builtins import str as FloatName
    from builtins import str as LeastName
    from builtins import str as ObserverName
    from builtins import str as ProviderName
    from builtins import str as SchemeName
    from builtins import str as SoftmaxName
else:
    BackendName = Literal[names("exporters.backends")]
    CollectorName = Literal[names("calibrators.collectors")]
    BlockSize = Literal[_BLOCKS]
    DeviceName = Literal[_DEVICES]
    FloatName = Literal[_FLOATS]
    LeastName = Literal[_LEAST]
    ObserverName = Literal[_OBSERVERS]
    ProviderName = Literal[_PROVIDERS]
    SchemeName = Literal[tuple(SCHEMES)]
    SoftmaxName = Literal[_SOFTMAXES]


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which model, with which weights."""

    model: str
    """timm name with its pretrained tag, an alias (vit_t vit_s vit_b deit_t … swin_b), or demo."""
    checkpoint: Path | None = None
    """Weights file (.safetensors, .pth, .npz) to use instead of timm's hub."""
    random_weights: bool = False
    """Use random weights: the pipeline runs, the accuracy is meaningless."""
    seed: int = 0
    """Seed of the synthetic images and of random weights."""
    size: str = ""
    """Height and width of the images, such as 192 or 224x160; without it the model's own. Position embeddings of
    trained weights are resampled."""

    def __post_init__(self) -> None:
        _check(
            self.seed in range(2**32),
            f"--seed {self.seed} is out of range.",
            "seeds have 32 bits.",
            "0 to 2^32-1",
        )
        both = self.checkpoint is not None and self.random_weights
        _check(
            not both,
            "--checkpoint and --random-weights exclude each other.",
            "both name weights.",
            "one of them",
        )
        size_of(self.size)


@dataclass(frozen=True, kw_only=True)
class GenerateRecipe(ModelRecipe):
    """How synthetic images are made."""

    generator: str = "dfq"
    """Method that makes the synthetic images: dfq, psaq_v1, psaq_v2 (which changes the model's weights, too), spdfq,
    dead_leaves, noise, zeroq (models with BatchNorm), or several with commas between them, which share the count."""
    exact: bool = False
    """Compute in float32 and, as far as a generator's paper says them, with its estimator and its number of steps: many
    times slower for psaq_v1, a little for dfq."""
    device: DeviceName = "auto"
    """What makes the images: cpu, cuda, or auto (a GPU where PyTorch finds one); all else is computed on the CPU."""
    count: int = BATCH
    """Number of synthetic images."""
    first: int = 0
    """Number of the first one, a multiple of 32: several machines can make parts of a set, which --calib a,b joins."""
    scheme: SchemeName = "w8a8"
    """Formats: w8a8, w8a8_asym and w8a8_dynamic (ONNX Runtime), w8a8_fp8 (sm89 on), w4a16 (INT4 weights), float (no
    quantization); w4a8, w6a6 and w4a4 are for simulate only. Of generators they matter to psaq_v2 alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("scheme", self.scheme, tuple(SCHEMES))
        _check_name("device", self.device, _DEVICES)
        asked = self.generator.split(",")
        for name in asked:
            _check_name("generator", name, names("dfq_deploy.generation.generators"))
        wrong = f"--generator {self.generator} names one twice."
        _check(len(set(asked)) == len(asked), wrong, "it would make the same images twice.", "each name once")
        _check(self.count >= 1, f"--count {self.count} makes no images.", "at least one is needed.", "--count 32")
        wrong = f"--count {self.count} is too few for {len(asked)} generators."
        _check(self.count >= len(asked), wrong, "each makes one image or more.", f"--count {BATCH * len(asked)}")
        wrong = f"--first {self.first} begins no batch."
        _check(self.first >= 0 and self.first % BATCH == 0, wrong, f"images are made {BATCH} at a time.", "--first 0")
        alone = self.first == 0 or (len(asked) == 1 and asked[0] not in STUDENTS)
        wrong = f"--first {self.first} cannot be had from {self.generator}."
        _check(alone, wrong, "a student learns from all images; several generators share the count.", "--first 0")


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(GenerateRecipe):
    """How images become a plan."""

    calib: str = "synthetic"
    """Calibration images: synthetic, folder:PATH, npz:PATH, or a file made by `dfq-deploy generate`; several such files
    with commas between them count as one."""
    backend: BackendName = "ort"
    """What the plan and the engine are made for: ort (ONNX Runtime), trt (TensorRT), rtx (TensorRT for RTX)."""
    provider: ProviderName = "cpu"
    """What runs the engine within ONNX Runtime; other backends have no choice."""
    block: BlockSize = 64
    """Input channels that share a weight's scale; matters to w4a16. A layer that is not two or more of these wide gets
    smaller blocks, and the report says so."""
    collector: CollectorName = "pytorch"
    """Who reads activation ranges: pytorch, or ONNX Runtime's (ort) or TensorRT 10's (trt) calibrators to compare."""
    observer: ObserverName = "auto"
    """How ranges are read off the images: minmax, percentile, entropy, mse, hessian; auto: what suits the scheme."""
    percentile: float = 99.999
    """Share of values, in percent, that a range must hold; matters to the percentile observer."""
    attention: bool = False
    """Quantize the operands of the attention matmuls too; costs accuracy and, on a CPU, time."""
    refine: str = "default"
    """Passes that change weights so that they quantize better: none, default (what suits the scheme; none for a student
    of psaq_v2), or names with commas between them."""
    spare: str = "auto"
    """Layers that stay float: none, or names with commas between them; massive among them is the ends of the model and
    what has massive activations, auto that and, for ONNX Runtime, what makes most of the noise (w4a16: gets 8 bits)."""

    auto: bool = False
    """Give each layer the format, float among them, with which the engine is least and the predicted loss in budget."""
    least: LeastName = "latency"
    """What --auto makes small: latency (one image; ONNX Runtime on the CPU) or size."""
    max_drop: float = 0.3
    """The budget of --auto, in points of top-1."""
    min_agreement: float | None = None
    """The budget of --auto as agreement with float, in percent, in place of --max-drop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("backend", self.backend, names("exporters.backends"))
        _check_name("provider", self.provider, _PROVIDERS)
        wrong = f"--backend {self.backend} has no --provider {self.provider}."
        _check(self.backend == "ort" or self.provider == "cpu", wrong, "providers are ONNX Runtime's.", "--backend ort")
        wrong = f"--block {self.block} is no size of a block."
        _check(self.block in _BLOCKS, wrong, f"the sizes are {', '.join(map(str, _BLOCKS))}.", "one of them")
        _check_name("collector", self.collector, names("calibrators.collectors"))
        _check_name("observer", self.observer, _OBSERVERS)
        for name in () if self.refine in ("none", "default") else self.refine.split(","):
            _check_name("refine", name, names("calibrators.refine"))
        _check_name("least", self.least, _LEAST)
        wrong = f"--max-drop {self.max_drop:g} is out of range."
        _check(0 < self.max_drop <= 10, wrong, "it is a loss in points of top-1.", "0.3, or another up to 10")
        wrong = f"--min-agreement {self.min_agreement} is out of range."
        sound = self.min_agreement is None or 50 <= self.min_agreement < 100
        _check(sound, wrong, "it is a share of images in percent.", "98, or another from 50 to 100")
        wrong = f"--auto has nothing to choose from with --scheme {self.scheme}."
        scheme = SCHEMES[self.scheme]
        sound = not self.auto or (scheme.weight is not None and not scheme.simulated)
        _check(sound, wrong, "no engine computes in it, or nothing is quantized.", "--scheme w8a8")
        wrong = f"--percentile {self.percentile} is out of range."
        _check(50 < self.percentile <= 100, wrong, "it is a share of values in percent.", "a value such as 99.99")


@dataclass(frozen=True, kw_only=True)
class SimulateRecipe(CalibrateRecipe):
    """How images become a plan that is simulated only."""

    scheme: SchemeName = "w4a4"
    """Formats: w4a8, w6a6, w4a4, which no run-time has kernels for, or any of export's."""
    softmax: SoftmaxName = "log2"
    """What a softmax puts out, in w6a6 and w4a4: log2, even in the logarithm, or even steps; w4a8 has even ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("softmax", self.softmax, _SOFTMAXES)


@dataclass(frozen=True, kw_only=True)
class AuditRecipe(ModelRecipe):
    """What calibration images are audited against."""

    model: str = ""
    """timm name with its pretrained tag, an alias, or demo, that the images are for; a bundle knows its own."""
    seed: int = 0
    """Seed of random weights; that of the images is in their file."""
    scheme: SchemeName | None = None
    """Formats that the ranges are for, of those that need any; without it a bundle's own, those that a student which
    came with the images learned for, or w8a8."""
    real: str | None = None
    """Real images to hold the ranges against: folder:PATH, npz:PATH or an ImageSet file."""
    limit: int = 128
    """Use this many of the real images, evenly spaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme is not None:
            _check_name("scheme", self.scheme, tuple(SCHEMES))
        _check(self.limit >= 1, f"--limit {self.limit} leaves no images.", "at least one is needed.", "--limit 128")


@dataclass(frozen=True, kw_only=True)
class Recipe(CalibrateRecipe):
    """A whole run, from model to checked engine."""

    target: str = ""
    """GPUs that --backend rtx builds for, such as sm86,sm89,sm120; without it the engine fits all that it knows."""
    batch: str = "1,8,32"
    """Smallest, usual and largest number of images per call of a TensorRT engine."""
    optimization_level: int | None = None
    """TensorRT's builder optimization level, 0 to 5; higher builds longer. Without it TensorRT's own."""
    workspace: int | None = None
    """Scratch memory that one TensorRT kernel may use, in bytes."""
    keep_float: bool = False
    """Put float.onnx into the bundle too."""
    float: FloatName = "fp32"
    """What everything that is not quantized is computed in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("float", self.float, _FLOATS)
        sizes = self.batch.split(",")
        sound = len(sizes) == 3 and all(size.isdecimal() for size in sizes) and sorted(sizes, key=int) == sizes
        wrong = f"--batch {self.batch} names no sizes."
        why = "it takes the smallest, the usual and the largest number of images, in this order and from 1 on."
        _check(sound and int(sizes[0]) > 0 and int(sizes[2]) < 2**31, wrong, why, "three numbers such as 1,8,32")
        wrong = f"--optimization-level {self.optimization_level} does not exist."
        _check(self.optimization_level in (None, *range(6)), wrong, "TensorRT has 0 to 5.", "one of them")
        wrong = f"--workspace {self.workspace} is no size."
        sound = self.workspace is None or 0 < self.workspace < 2**63
        _check(sound, wrong, "it is a number of bytes.", "1073741824 for 1 GiB")

    @property
    def options(self) -> BuildOptions:
        """What the engine is built for."""
        smallest, usual, largest = map(int, self.batch.split(","))
        return BuildOptions(
            body=self.float,  # type: ignore[arg-type]  # the Literal is known at run time only
            provider=self.provider,
            targets=tuple(dict.fromkeys(target for target in self.target.split(",") if target)),
            batch=(smallest, usual, largest),
            level=self.optimization_level,
            workspace=self.workspace,
        )

    def facts(self) -> dict[str, Any]:
        """The fields as JSON and TOML know them; what is not set is left out."""
        texts = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        texts["calib"] = _resolved(self.calib)
        return {k: v for k, v in texts.items() if v is not None}


def size_of(text: str) -> tuple[int, int] | None:
    """Height and width as --size has them; None where it is empty.

    Raises:
        RecipeError: It is no size.
    """
    edges = text.split("x")
    sound = len(edges) <= 2 and all(edge.isdecimal() and edge.isascii() and 0 < len(edge) < 6 for edge in edges)
    sound = not text or (sound and all(map(int, edges)))
    _check(sound, f"--size {text} is no size.", "it is one edge, or height x width, in pixels.", "192 or 224x160")
    return (int(edges[0]), int(edges[-1])) if text else None


def _check(holds: bool, what: str, why: str, instead: str) -> None:
    if not holds:
        raise RecipeError(what=what, why=why, fix=f"pass {instead}.")


def note_unused(recipe: CalibrateRecipe, names: Sequence[str], when: str) -> None:
    """Say of the fields `names` that are not as they are by default that they mean nothing."""
    for name in (name for name in names if getattr(recipe, name) != getattr(CalibrateRecipe, name)):
        warnings.warn(f"--{name.replace('_', '-')} means nothing {when}.", CalibrationWarning, stacklevel=2)


def _resolved(calib: str) -> str:
    """`calib`, with paths that lead there from any folder."""
    kind, colon, path = calib.partition(":")
    if colon and kind in names("calibrators.sources"):
        return f"{kind}:{Path(path).resolve()}"
    parts = [calib] if Path(calib).is_file() else calib.split(",")
    return calib if calib == "synthetic" else ",".join(str(Path(part).resolve()) for part in parts)


def _check_name(kind: str, name: str, offered: tuple[str, ...]) -> None:
    what = f"there is no {kind} named `{name}`."
    _check(name in offered, what, f"there are {', '.join(offered)}.", f"one of them with --{kind}")
