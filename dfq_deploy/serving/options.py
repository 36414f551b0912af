"""How a bundle is served: every field is a flag. Checked here, once.

What the server and a Triton repository have in common comes first. Whether requests may share a call of the engine
depends on the bundle, too: where activations are scaled anew in each call, images in one call change each other's
logits.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from calibrators.errors import RecipeError
from calibrators.scheme import scheme_named
from exporters.bundle import Manifest

__all__ = ["RepoOptions", "ServeOptions", "ServingOptions", "gathers", "name_for"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What is the same whoever serves."""

    name: str | None = None
    """Name of the served model; without it, that of the model in the bundle."""
    gather: bool | None = None
    """Compute requests that wait in one call of the engine. Without it: yes, unless their answers would then depend on
    one another (w8a8_dynamic)."""
    delay_ms: float = 2.0
    """Most milliseconds that a request waits for others to join it."""
    queue: int = 64
    """Most requests that wait at a time; further ones are refused."""
    max_pixels: int = 2**25
    """Most pixels that an encoded image may have, as it is and resized for the model."""
    verify: Path | None = None
    """Public key (PEM) that the bundle must be signed with."""

    def __post_init__(self) -> None:
        named = self.name is None or _NAME.fullmatch(self.name)
        _check(bool(named), f"--name {self.name} names no model.", "names have letters, digits and `_.-`.", "--name m")
        wrong = f"--delay-ms {self.delay_ms} is out of range."
        _check(0 <= self.delay_ms <= 1000, wrong, "nobody waits longer than a second to be computed.", "--delay-ms 2")
        for flag, value in (("--queue", self.queue), ("--max-pixels", self.max_pixels)):
            _check(value >= 1, f"{flag} {value} lets nothing in.", "at least one is needed.", f"{flag} 1 or more")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServingOptions):
    """How the server of this package serves."""

    host: str = "127.0.0.1"
    """Address to listen on; there is no password, so another one is for a network that you trust."""
    port: int = 8000
    """Port to listen on; 0 for one that is free."""
    max_mb: int | None = None
    """Largest request in MiB; without it, what the largest batch takes as a binary tensor, and one more."""
    read_s: float = 30.0
    """Most seconds that a request may take to arrive."""
    stop_s: int = 30
    """Most seconds that answers may take once the server was told to stop."""
    provider: str | None = None
    """What runs the engine within ONNX Runtime, if not what it was exported for: cpu, cuda, tensorrt or rtx."""
    threads: int | None = None
    """What ONNX Runtime computes a call with; without it, as many as there are cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(0 <= self.port < 2**16, f"--port {self.port} is out of range.", "ports have 16 bits.", "--port 8000")
        for flag, value in (("--max-mb", self.max_mb), ("--read-s", self.read_s), ("--stop-s", self.stop_s)):
            _check(value is None or value > 0, f"{flag} {value} lets nothing in.", "more is needed.", f"{flag} 30")
        none = self.threads is not None and self.threads < 1
        _check(
            not none, f"--threads {self.threads} computes nothing.", "at least one is needed.", "--threads 1 or more"
        )


@dataclass(frozen=True, kw_only=True)
class RepoOptions(ServingOptions):
    """What a Triton model repository says beside what the bundle says."""

    instances: int = 1
    """Copies of the engine that run side by side, and on a GPU on each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = f"--instances {self.instances} runs nothing."
        _check(self.instances >= 1, wrong, "at least one is needed.", "--instances 1")


def name_for(options: ServingOptions, manifest: Manifest) -> str:
    """The name of the served model, fit for a URL and for a folder."""
    return options.name or re.sub(r"[^A-Za-z0-9_.-]", "_", manifest.model.name).lstrip(".-") or "model"


def gathers(options: ServingOptions, manifest: Manifest) -> bool:
    """Whether requests share a call of the engine.

    Raises:
        RecipeError: It is asked for, and answers would depend on who else asks.
    """
    dynamic = scheme_named(manifest.scheme).dynamic
    _check(
        not (dynamic and options.gather),
        f"--gather does not suit `{manifest.scheme}`.",
        "its activations are scaled by all images of a call: answers would depend on who else asks.",
        "--no-gather, or export with --scheme w8a8",
    )
    return not dynamic if options.gather is None else options.gather


def _check(good: bool, what: str, why: str, fix: str) -> None:
    if not good:
        raise RecipeError(what=what, why=why, fix=f"pass {fix}.")
