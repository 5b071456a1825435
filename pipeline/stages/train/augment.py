"""Image augmentation in plain torch: crops, flips, random operations (RandAugment), mixup and cutmix.

All of it is a function of a seed and the sample's position in the stream of data, so that a resumed training sees the
same images, whatever the number of workers (mixup and cutmix pair samples within a micro-batch).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polytrope.pipeline.stages.train.parameters import AugmentationParameters

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
COLOUR = ("brightness", "contrast", "solarize", "posterize", "autocontrast")


def augment(images: Tensor, parameters: AugmentationParameters, seed: int, positions: np.ndarray) -> Tensor:
    """Augment each image on its own.

    Args:
        images: `[samples, channels, height, width]` float in [0, 1].
        seed, positions: the random stream of each sample; `positions` `[samples]` are unique over the training.
    """
    affected = []
    for image, position in zip(images, positions, strict=True):
        random = np.random.default_rng([seed, 0xA06, int(position)])
        if parameters.horizontal_flip and random.random() < 0.5:
            image = image.flip(-1)
        if parameters.crop_padding:
            image = random_crop(image, parameters.crop_padding, random)
        for name in random.choice(GEOMETRIC + COLOUR, size=parameters.operations):
            image = apply_operation(image, str(name), parameters.magnitude, random)
        affected.append(image)
    return torch.stack(affected)


def random_crop(image: Tensor, padding: int, random: np.random.Generator) -> Tensor:
    """Shift by up to `padding` pixels in both directions; the border is filled with zeros."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (padding, padding, padding, padding))
    top, left = random.integers(0, 2 * padding + 1, size=2)
    cropped: Tensor = padded[:, top : top + height, left : left + width]
    return cropped


def apply_operation(image: Tensor, name: str, magnitude: float, random: np.random.Generator) -> Tensor:
    """One operation at `magnitude` in [0, 1], with a random sign; `[channels, height, width]` in [0, 1] to the same.

    At magnitude 1: 30° rotation, shear 0.3, translation by 45 % of the size, brightness and contrast × 0.1 … 1.9,
    solarize above 0, posterize to 4 bits (Cubuk et al., 2020, table 6).
    """
    signed = magnitude * (1.0 if random.random() < 0.5 else -1.0)
    if name in GEOMETRIC:
        return _warp(image, _affine(name, signed))
    if name == "brightness":
        return (image * (1.0 + 0.9 * signed)).clamp(0.0, 1.0)
    if name == "contrast":
        mean = image.mean()
        return (mean + (image - mean) * (1.0 + 0.9 * signed)).clamp(0.0, 1.0)
    if name == "solarize":
        return torch.where(image >= 1.0 - magnitude, 1.0 - image, image)
    if name == "posterize":
        levels = (1 << (8 - round(4 * magnitude))) - 1
        return (image * levels).round() / levels
    if name == "autocontrast":
        low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
        return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)
    raise ValueError(f"unknown operation `{name}`; there are: {', '.join(GEOMETRIC + COLOUR)}")


def _affine(name: str, signed: float) -> Tensor:
    if name == "rotate":
        angle = math.radians(30.0 * signed)
        return torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    matrix = torch.eye(2, 3)
    row, column, value = {
        "shear_x": (0, 1, 0.3 * signed),
        "shear_y": (1, 0, 0.3 * signed),
        "translate_x": (0, 2, 0.9 * signed),  # grid coordinates span 2
        "translate_y": (1, 2, 0.9 * signed),
    }[name]
    matrix[row, column] = value
    return matrix


def _warp(image: Tensor, matrix: Tensor) -> Tensor:
    grid = F.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    warped: Tensor = F.grid_sample(image[None], grid, align_corners=False)[0]
    return warped


def mix(
    images: Tensor, classes: Tensor, parameters: AugmentationParameters, number: int, seed: int, position: int
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of a micro-batch with itself in reverse order.

    Args:
        images: `[samples, channels, height, width]`.
        classes: `[samples]` int64.
        number: of classes.
        seed, position: the random stream; `position` is the stream position of the first sample.

    Returns:
        The mixed images and class probabilities `[samples, number]`. If both are on, one of them is drawn.
    """
    random = np.random.default_rng([seed, 0x317, position])
    targets = F.one_hot(classes, number).float()
    use_cutmix = parameters.cutmix > 0 and (parameters.mixup == 0 or random.random() < 0.5)
    alpha = parameters.cutmix if use_cutmix else parameters.mixup
    share = float(random.beta(alpha, alpha))
    partners = images.flip(0)
    if use_cutmix:
        height, width = images.shape[-2:]
        box_height, box_width = (round(size * math.sqrt(1.0 - share)) for size in (height, width))
        top, left = int(random.integers(0, height - box_height + 1)), int(random.integers(0, width - box_width + 1))
        images = images.clone()
        rows, columns = slice(top, top + box_height), slice(left, left + box_width)
        images[:, :, rows, columns] = partners[:, :, rows, columns]
        share = 1.0 - box_height * box_width / (height * width)
    else:
        images = share * images + (1.0 - share) * partners
    return images, share * targets + (1.0 - share) * targets.flip(0)
