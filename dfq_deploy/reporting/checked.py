"""What an earlier check or gate wrote about a bundle, read back for a report; nothing in these files is trusted."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibrators.errors import BundleError
from calibrators.files import sha256_of
from calibrators.scheme import scheme_named
from dfq_deploy.gating.result import sums_of
from dfq_deploy.stage_costs import StageCost
from exporters.bundle import MANIFEST, Manifest

__all__ = [
    "Audited",
    "Checked",
    "Gate",
    "Interval",
    "Sensed",
    "Shown",
    "read_audit",
    "read_audit_of",
    "read_check",
    "read_gate",
    "read_sensitivity",
]


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Decision(_Read):
    index: int = Field(ge=0)
    percent: float | None


class Shown(_Read):
    """An image on which the engine decides otherwise; see `dfq_deploy.disagreements.Disagreement`."""

    image: int
    name: str
    label: int | None
    float: _Decision
    reference: _Decision
    engine: _Decision


class _Asked(_Read):
    images: str | None = None
    limit: int | None = None


class Checked(_Read):
    """What report.json holds; see `dfq_deploy.evaluate.Check`.

    Attributes:
        of: Fingerprint of the images, SHA-256 of the bundle's files and of the sheet of disagreements; empty where an
            earlier version checked.
        asked: What the check was told to use; None where an earlier version checked.
        stages: What each stage took that led there.
    """

    n: int
    images: str
    top1: dict[str, float] | None
    drop: Interval | None
    agreement: dict[str, float]
    intervals_95: dict[str, tuple[float, float]]
    floor_ratio: tuple[float | None, float | None, float | None]
    sqnr_db: dict[str, float | None]
    ran: str
    layer_error: dict[str, float | None]
    verdict: Literal["pass", "fail", "undecided"]
    reason: str
    student: bool = False
    disagreed: int = 0
    disagreements: tuple[Shown, ...] = ()
    of: dict[str, str] = {}
    asked: _Asked | None = None
    stages: dict[str, StageCost] = {}

    def share(self, name: str) -> Interval | None:
        """A percentage with its interval: `top1_engine`, `engine_float`, …; None where it was not measured."""
        kind, _, who = name.partition("_")
        value = (self.top1 or {}).get(who) if kind == "top1" else self.agreement.get(name)
        ends = self.intervals_95.get(name)
        return None if value is None or ends is None else Interval(value, *ends)

    def stale(self, manifest: Manifest) -> bool:
        """Whether it is of other files than the bundle has now."""
        return any(self.of.get(name, recorded) != recorded for name, recorded in manifest.files.items())


class _GateCheck(_Read):
    name: str
    value: Any = None
    limit: Any = None
    interval: Any = None
    verdict: str = ""


class Gate(_Read):
    """What gate.json holds, as far as it reads."""

    verdict: str
    mode: str = ""
    n: int | None = None
    checks: tuple[_GateCheck, ...] = ()
    smallest_detectable_drop_pt: float | None = None


class _Held(_Read):
    drift: float | None
    excess_ppm: float | None
    noise_excess_ppm: float | None


class _Site(_Read):
    site: str
    others: dict[str, _Held]


class Audited(_Read):
    """What audit.json holds; see `dfq_deploy.audited.Audit`."""

    n: int
    images: str
    scheme: str = ""
    of: dict[str, str] = {}
    others: dict[str, str]
    absent: dict[str, str]
    sites: tuple[_Site, ...]
    held_against: str
    level: str
    verdict: str


class _Effect(_Read):
    noise: float | None
    sqnr_db: float | None


class _Layer(_Read):
    name: str
    alone: _Effect
    gain_db: float | None
    noise_percent: float
    macs_percent: float
    sites: dict[str, _Effect]


class _Spared(_Read):
    name: str
    alone: _Effect | None
    macs_percent: float


_ROLES = {
    "input": "input",
    "weight": "weight",
    "output": "output",
    "lhs": "first operand",
    "rhs": "second operand",
}


class Sensed(_Read):
    """What a sensitivity analysis wrote; see `dfq_deploy.analysis.Sensitivity`."""

    n: int
    images: str
    whole: _Effect
    layers: tuple[_Layer, ...]
    spared: tuple[_Spared, ...]

    @property
    def roles(self) -> dict[str, str]:
        """The roles of the sites that were measured, as their names end, and what they are called."""
        seen = {site.rpartition(".")[2] for layer in self.layers for site in layer.sites}
        return {role: called for role, called in _ROLES.items() if role in seen}


_Kind = TypeVar("_Kind", bound=_Read)


def read_check(folder: Path) -> Checked:
    """The last check of the bundle in `folder`.

    Raises:
        BundleError: There is none that reads.
    """
    return _read(folder / "report.json", Checked, f"dfq-deploy check {folder.name}")


def read_gate(folder: Path) -> Gate:
    """What the gate found.

    Raises:
        BundleError: gate.json does not read, or is of another bundle than lies here now.
    """
    path = folder / "gate.json"
    command = f"dfq-deploy gate {folder.name} --json {folder.name}/{path.name}"
    found = _read(path, Gate, command)
    sums = path.with_suffix(".sha256")
    try:
        same = sums.read_bytes() == sums_of(sha256_of(folder / MANIFEST), path).encode()
    except OSError:
        same = False
    if not same:
        raise BundleError(
            what="the gate may have judged another bundle.",
            why=f"{sums.name} does not say that {path.name} is of the {MANIFEST} that lies here now.",
            fix=f"run `{command}` again.",
        )
    return found


def read_audit(path: Path) -> Audited:
    """What an audit found.

    Raises:
        BundleError: The file does not read.
    """
    return _read(path, Audited, "dfq-deploy audit")


def read_audit_of(folder: Path, manifest: Manifest) -> Audited:
    """What the audit in `folder/audit` found.

    Raises:
        BundleError: It does not read, or is of other images, another model or another scheme than the bundle in
            `folder`; where the bundle's has no ranges, the audit's may be another.
    """
    command = f"dfq-deploy audit {folder.name} --out {folder.name}/audit"
    found = _read(folder / "audit" / "audit.json", Audited, command)
    same = found.of == {"images": manifest.images["fingerprint"], "model": manifest.model.fingerprint}
    asked = scheme_named(manifest.scheme)
    without_ranges = asked.dynamic or asked.activation is None
    if not same or (found.scheme != manifest.scheme and not without_ranges):
        raise BundleError(
            what="the audit is not of this bundle.",
            why=f"audit/audit.json is of other images, another model or other formats ({found.scheme or 'not said'}).",
            fix=f"run `{command}` again.",
        )
    return found


def read_sensitivity(path: Path) -> Sensed:
    """What a sensitivity analysis found.

    Raises:
        BundleError: The file does not read.
    """
    return _read(path, Sensed, "dfq-deploy sensitivity")


def _read(path: Path, kind: type[_Kind], command: str) -> _Kind:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as cause:
        raise BundleError(what=f"there is no {path.name}.", why="nobody wrote it.", fix=f"run `{command}`.") from cause
    except (OSError, ValueError, RecursionError) as cause:  # ValidationError is a ValueError
        first = cause.errors()[0] if isinstance(cause, ValidationError) else None
        why = f"{first['msg']} at `{'.'.join(map(str, first['loc']))}`." if first else f"{type(cause).__name__}."
        raise BundleError(what=f"{path.name} cannot be read.", why=why, fix=f"run `{command}` again.") from cause
