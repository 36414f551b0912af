"""What a benchmark is asked for: every field is a flag of `dfq-deploy bench generators` and a key of a TOML file.

Checked once, here. It loads no torch, so that `--help` waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from calibrators.errors import RecipeError
from calibrators.registry import names
from calibrators.scheme import SCHEMES
from dfq_deploy.recipe import CalibrateRecipe, DeviceName, ModelRecipe

__all__ = ["NOISE", "REAL", "GeneratorsRecipe", "form_of"]

NOISE = "noise"
"""The generator that all others are held against."""
REAL = "real"
"""What real images are called where generators have their names."""
_EXACT = ":exact"


@dataclass(frozen=True, kw_only=True)
class GeneratorsRecipe(ModelRecipe):
    """Which generators are compared, under which quantizers, how often."""

    seed: int = 0
    """Seed of random weights; those of the images are --seeds."""
    generators: str = f"{NOISE},psaq_v1,psaq_v2,spdfq,dfq"
    """Generators, with commas between them; noise among them, if it is to be told how far the others come from it.
    NAME:exact is a generator as its authors compute it, as by --exact."""
    schemes: str = "w8a8,w6a6,w4a8,w4a4"
    """Formats, with commas between them; simulated, so that any will do."""
    refine: tuple[str, ...] = ("none", "default")
    """Refine passes: none (ranges alone), default (what suits the scheme), or names with commas; once per chain."""
    seeds: str = "0,1,2"
    """Seeds of the images, with commas between them. Real images are drawn by them."""
    count: int = 32
    """Number of images per set."""
    device: DeviceName = "auto"
    """What makes the images: cpu, cuda, or auto (a GPU where PyTorch finds one); the rest is computed on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        generators = names("dfq_deploy.generation.generators")
        exact = [name + _EXACT for name in generators]
        _check_names(
            "generators",
            self.generator_names,
            (*generators, *exact),
            f"{', '.join(generators)}; each also as NAME:exact",
        )
        schemes = [name for name, scheme in SCHEMES.items() if scheme.weight]
        _check_names("schemes", self.scheme_names, schemes, ", ".join(schemes))
        _check_twice("refine", self.refine)
        for seed in self.seeds.split(","):
            if not (seed.isdecimal() and int(seed) in range(2**32)):
                raise RecipeError(
                    what=f"`{seed}` in --seeds {self.seeds} is no seed.",
                    why="seeds are whole numbers from 0 to 2^32-1, with commas between them.",
                    fix="pass some, such as --seeds 0,1,2.",
                )
        _check_twice("seeds", self.seed_numbers)
        for chain in self.refine:  # the rest is what a single run would be told
            CalibrateRecipe(model=self.model, count=self.count, refine=chain, device=self.device)

    @property
    def generator_names(self) -> tuple[str, ...]:
        """The generators as they are spelled, one by one; see `form_of`."""
        return tuple(self.generators.split(","))

    @property
    def scheme_names(self) -> tuple[str, ...]:
        """The schemes, one by one."""
        return tuple(self.schemes.split(","))

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, one by one."""
        return tuple(map(int, self.seeds.split(",")))

    def quantizer(self, scheme: str, refine: str = "none") -> CalibrateRecipe:
        """The one quantizer of all images: which layers stay float does not depend on them."""
        return CalibrateRecipe(model=self.model, count=self.count, scheme=scheme, refine=refine, spare="massive")


def form_of(generator: str) -> tuple[str, bool]:
    """The name of a generator that is spelled as in --generators, and whether it computes as its authors do."""
    return generator.removesuffix(_EXACT), generator.endswith(_EXACT)


def _check_names(flag: str, asked: tuple[str, ...], offered: Sequence[str], told: str) -> None:
    unknown = [name for name in asked if name not in offered]
    if unknown:
        raise RecipeError(
            what=f"`{unknown[0]}` in --{flag} is unknown.",
            why=f"there are {told}.",
            fix="pass one or more of them, with commas between them.",
        )
    _check_twice(flag, asked)


def _check_twice(flag: str, asked: Sequence[str | int]) -> None:
    twice = [value for value in asked if asked.count(value) > 1]
    if twice or not asked:
        raise RecipeError(
            what=f"--{flag} names `{twice[0]}` twice." if twice else f"--{flag} names nothing.",
            why="each value gives rows of its own, and at least one is needed.",
            fix="pass each value once.",
        )
