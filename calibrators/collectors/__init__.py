"""Collectors: who drives calibration images through a model and brings home ranges."""
