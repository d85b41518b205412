"""Image files and folders, as evaluation reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flux2.data.lines import FORMATS
from flux2.errors import InputError


def read_image(file: Path) -> np.ndarray:
    """h w 3 uint8, upright. Raises InputError where it is no image."""
    try:
        with Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from None


def check_folder(option: str, folder: Path, holds: str) -> None:
    """Raises InputError where what `option` names is no folder. holds: what it should hold."""
    if not folder.is_dir():
        raise InputError(f"{option}={folder} is no folder: name one with {holds}")
