"""One run, described: every field is a flag of the command line and a key of a TOML file.

The classes build on one another as the stages do. They are checked once, here; the rest of the code trusts them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from calibrators.errors import RecipeError
from calibrators.files import written_whole
from calibrators.registry import names
from calibrators.scheme import SCHEMES

__all__ = ["CalibrateRecipe", "GenerateRecipe", "ModelRecipe", "Recipe"]

_OBSERVERS = ("minmax", "percentile", "entropy")

if TYPE_CHECKING:  # the choices are what lies in the plugin folders, which a type checker cannot know
    from builtins import str as BackendName
    from builtins import str as CollectorName
    from builtins import str as GeneratorName
    from builtins import str as ObserverName
    from builtins import str as SchemeName
else:
    BackendName = Literal[names("exporters.backends")]
    CollectorName = Literal[names("calibrators.collectors")]
    GeneratorName = Literal[names("dfq_deploy.generation.generators")]
    ObserverName = Literal[_OBSERVERS]
    SchemeName = Literal[tuple(SCHEMES)]


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


@dataclass(frozen=True, kw_only=True)
class GenerateRecipe(ModelRecipe):
    """How synthetic images are made."""

    generator: GeneratorName = "psaq_v1"
    """Method that makes the synthetic images."""
    exact: bool = False
    """Follow the paper's estimator and schedule to the letter; slower by an order of magnitude."""
    count: int = 32
    """Number of synthetic images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        offered = names("dfq_deploy.generation.generators")
        _check_name("generator", self.generator, offered)
        _check(self.count >= 1, f"--count {self.count} makes no images.", "at least one is needed.", "--count 32")


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(GenerateRecipe):
    """How images become a plan."""

    calib: str = "synthetic"
    """Calibration images: synthetic, folder:PATH, npz:PATH, or a file made by `dfq-deploy generate`."""
    scheme: SchemeName = "w8a8"
    """Number formats: w8a8 is symmetric and portable, w8a8_asym is for ONNX Runtime only."""
    collector: CollectorName = "pytorch"
    """Who runs the images to read activation ranges: pytorch, or to compare with it ONNX Runtime's (ort) or
    TensorRT 10's (trt) own calibrators."""
    observer: ObserverName = "percentile"
    """How activation ranges are read off the images; entropy is the ort and trt collectors' alone."""
    percentile: float = 99.999
    """Share of values, in percent, that a range must hold; matters to the percentile observer."""
    attention: bool = False
    """Quantize the operands of the attention matmuls too; costs accuracy and, on a CPU, time."""
    spare: str = "auto"
    """Layers that stay float: auto (the first, the last, and any with massive activations), none, or names with
    commas between them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("scheme", self.scheme, tuple(SCHEMES))
        _check_name("collector", self.collector, names("calibrators.collectors"))
        _check_name("observer", self.observer, _OBSERVERS)
        wrong = f"--percentile {self.percentile} is out of range."
        _check(50 < self.percentile <= 100, wrong, "it is a share of values in percent.", "a value such as 99.99")


@dataclass(frozen=True, kw_only=True)
class Recipe(CalibrateRecipe):
    """A whole run, from model to checked engine."""

    backend: BackendName = "ort"
    """Run-time that the engine is made for."""
    keep_float: bool = False
    """Put float.onnx into the bundle too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("backend", self.backend, names("exporters.backends"))

    def facts(self) -> dict[str, Any]:
        """The fields as JSON and TOML know them; what is not set is left out."""
        texts = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {k: v for k, v in texts.items() if v is not None}

    def save(self, path: Path) -> None:
        """Write the recipe as TOML; `--recipe` reads it again."""
        with written_whole(path) as temporary:
            temporary.write_text(tomli_w.dumps(self.facts()), encoding="utf-8")


def _check(holds: bool, what: str, why: str, instead: str) -> None:
    if not holds:
        raise RecipeError(what=what, why=why, fix=f"pass {instead}.")


def _check_name(kind: str, name: str, offered: tuple[str, ...]) -> None:
    what = f"there is no {kind} named `{name}`."
    _check(name in offered, what, f"there are {', '.join(offered)}.", f"one of them with --{kind}")
