"""How sets of images are named and coloured, the same in every chart of an audit."""

from dfq_deploy.audited import REAL, SEED
from dfq_deploy.coverage import NOISE, OWN

__all__ = ["COLOURS", "MARKS", "NAMES"]

NAMES = {OWN: "these images", SEED: "another seed", NOISE: "noise", REAL: "real images"}
COLOURS = {OWN: "#2f6f9f", SEED: "#e0a458", NOISE: "#8a8a8a", REAL: "#a02c2c"}
MARKS = {OWN: "o", SEED: "D", NOISE: "x", REAL: "s"}
