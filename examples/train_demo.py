"""Train the small vision transformer that the demo and the tests quantize.

The model is a 0.2 M parameter timm ``VisionTransformer`` trained on scikit-learn's handwritten digits,
small enough to ship with the package. Run from the repository root, the script writes
``weights.safetensors`` (fp32) and ``held_back.npz`` (the 20 % of the images that training never sees, as
8x8 greyscale), so accuracy before and after quantization can be compared without any download.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

SEED = 0
HELD_BACK_FRACTION = 0.2
IMAGE_SIZE = 32
DIGITS_MAX = 16.0  # load_digits stores grey levels 0..16
MEAN = STD = 0.5
EPOCHS = 60
BATCH_SIZE = 64
PEAK_LR = 1e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.1  # of all steps
MAX_SHIFT = 0.1  # of the image's width
MAX_ROTATION = math.radians(10)
BACKGROUND = (0.0 - MEAN) / STD  # what a black pixel becomes


def build_model() -> VisionTransformer:
    """Return the untrained demo model."""
    return VisionTransformer(img_size=IMAGE_SIZE, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=10)


def preprocess(images: np.ndarray) -> Tensor:
    """Turn stored digits into model input.

    Args:
        images: Greyscale digits, uint8, shape (N, 8, 8).

    Returns:
        Normalised RGB batch, float32, shape (N, 3, 32, 32).
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = [Image.fromarray(image).convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in images]
    batch = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
    return (batch.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def augment(batch: Tensor) -> Tensor:
    """Shift and rotate every image of a normalised batch by a small random amount."""
    angle = (torch.rand(len(batch)) * 2 - 1) * MAX_ROTATION
    # affine_grid works in [-1, 1], where the image is 2 wide.
    shift = (torch.rand(len(batch), 2, 1) * 2 - 1) * 2 * MAX_SHIFT
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    theta = torch.cat([rotation, shift], dim=2)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    # grid_sample pads with zeros, so the background has to be zero while it runs.
    return functional.grid_sample(batch - BACKGROUND, grid, align_corners=False) + BACKGROUND


def train(model: VisionTransformer, images: Tensor, labels: Tensor) -> None:
    """Train in place with AdamW, the learning rate rising and then falling as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LR,
        epochs=EPOCHS,
        steps_per_epoch=math.ceil(len(images) / BATCH_SIZE),
        pct_start=WARMUP_FRACTION,
        cycle_momentum=False,
    )
    model.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = functional.cross_entropy(model(augment(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


@torch.inference_mode()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy, between 0 and 1."""
    return float((model.eval()(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, measure on the held-back digits, and write both files."""
    parser = argparse.ArgumentParser(description="Train the demo vision transformer.")
    parser.add_argument("--out", type=Path, default=Path("dfq_deploy/models/demo"))
    out: Path = parser.parse_args().out
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the summation order, hence the result, depends on it

    pixels, digits = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * 255 / DIGITS_MAX).astype(np.uint8)
    train_images, held_images, train_labels, held_labels = train_test_split(
        images, digits, test_size=HELD_BACK_FRACTION, stratify=digits, random_state=SEED
    )
    model = build_model()
    train(model, preprocess(train_images), torch.from_numpy(train_labels))
    score = accuracy(model, preprocess(held_images), torch.from_numpy(held_labels))

    out.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors orders several at random, and the file should be the same each run.
    about = f"Digits demo, timm VisionTransformer: seed {SEED}, held-back accuracy {score:.4f}"
    weights = out / "weights.safetensors"
    save_file(model.state_dict(), weights, metadata={"about": about})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner only
    np.savez_compressed(out / "held_back.npz", images=held_images, labels=held_labels.astype(np.int64))
    print(f"held-back accuracy {score:.2%} on {len(held_labels)} images, written to {out}")


if __name__ == "__main__":
    main()
