"""Dead leaves: images of shapes that cover one another, over and with textures of falling spectrum.

They have what photographs have and noise lacks: smooth areas, edges and large structures. No model is asked.

Source: Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 41 (2001); textures of falling spectrum as
in Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963, sec. 3. Sizes, counts and colours are ours.
"""

import numpy as np

from calibrators.preprocess import Preprocess

__all__ = ["dead_leaves"]

_MOST_LEAVES = 60
_SMALLEST, _LARGEST = 0.02, 0.6  # radius of a leaf, of the image's height
_SLOPES = (0.5, 2.5)  # of a texture's amplitudes over the frequency, in logarithms
_TEXTURES = 3  # per image


def dead_leaves(random: np.random.Generator, preprocess: Preprocess, *, chroma: float | None = None) -> np.ndarray:
    """One image, (C, H, W) float32 in normalised units.

    Args:
        random: Draws it.
        preprocess: Its size, and what its units are.
        chroma: How far a leaf's channels are from its grey, a standard deviation of values from 0 to 1; in photographs
            it is small. None: any colour is as likely as any other.
    """
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    normalised: np.ndarray = (_image(random, preprocess.shape, chroma) - mean) / std
    return normalised


def _image(random: np.random.Generator, shape: tuple[int, int, int], chroma: float | None) -> np.ndarray:
    """One image, (C, H, W) float32 from 0 to 1."""
    channels, height, width = shape
    textures = [_texture(random, shape) for _ in range(_TEXTURES)]
    image = 0.5 + random.uniform(0.05, 0.25) * textures[0]
    image = image + (random.normal(0, 0.2, (channels, 1, 1)) if chroma is None else random.normal(0, 0.2))
    y, x = np.mgrid[:height, :width]
    for _ in range(random.integers(_MOST_LEAVES)):
        radius = height * min(_SMALLEST / random.random(), _LARGEST)  # small ones are many, as in photographs
        angle, flatness = random.uniform(0, np.pi), random.uniform(0.3, 1)
        left, up = x - random.uniform(0, width), y - random.uniform(0, height)
        along = left * np.cos(angle) + up * np.sin(angle)
        across = (up * np.cos(angle) - left * np.sin(angle)) / flatness
        inside = np.hypot(along, across) if random.random() < 0.5 else np.maximum(np.abs(along), np.abs(across))
        colour = random.uniform(0, 1, (channels, 1, 1))
        if chroma is not None:
            colour = colour[:1] + random.normal(0, chroma, (channels, 1, 1))
        leaf = colour + random.uniform(0, 0.25) * textures[random.integers(_TEXTURES)]
        image = np.where(inside < radius, leaf, image)
    return np.clip(image, 0, 1).astype(np.float32)


def _texture(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Noise of a falling spectrum, mean 0 and deviation 1 per channel, (C, H, W)."""
    channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    spectrum = random.normal(size=(2, channels, *frequency.shape)) / frequency ** random.uniform(*_SLOPES)
    noise = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
    noise = np.tensordot(1 + random.normal(0, 0.5, (channels, channels)), _standard(noise), 1)  # colours go together
    return _standard(noise)


def _standard(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values - values.mean((1, 2), keepdims=True)
    found /= np.maximum(found.std((1, 2), keepdims=True), 1e-6)
    return found
