"""Colours as the eye tells them apart: CIE L*a*b* and the CIEDE2000 difference."""

from __future__ import annotations

import math

import numpy as np

_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4).astype("f4")
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_CONE = np.ascontiguousarray((_TO_XYZ / _WHITE[:, None]).T.astype("f4"))


def lab(colours: np.ndarray) -> np.ndarray:
    """sRGB uint8 (… 3) → CIE L*a*b* under D65 (… 3), fp32.

    By a table, in fp32: for whole images. It agrees with the definition to 1e-3.
    """
    if colours.dtype != np.uint8 or colours.shape[-1:] != (3,):
        raise ValueError(f"colours are … 3 uint8, not {colours.shape} {colours.dtype}")
    t = _LINEAR[colours] @ _TO_CONE
    f = np.where(
        t > (6 / 29) ** 3, np.cbrt(t), t / np.float32(3 * (6 / 29) ** 2) + np.float32(4 / 29)
    )
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ΔE2000 of L*a*b* colours (… 3 each, floats, broadcast) → …, with kL = kC = kH = 1.

    Computed in the colours' own precision; fp32 is good to 1e-3 but where hues are opposite.
    About 1 is the smallest difference that is seen; black and white are 100 apart.
    Source: Sharma, Wu and Dalal 2005, "The CIEDE2000 color-difference formula", equations 2 to 22.
    """
    l1, a1, b1 = a[..., 0], a[..., 1], a[..., 2]
    l2, a2, b2 = b[..., 0], b[..., 1], b[..., 2]
    mean_c = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7)))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.arctan2(b1, a1) % (2 * np.pi), np.arctan2(b2, a2) % (2 * np.pi)
    grey = c1 * c2 == 0  # hue is undefined there

    turn = h2 - h1
    far = np.abs(turn) > np.pi
    dh = np.where(grey, 0, np.where(far, turn - np.sign(turn) * 2 * np.pi, turn))
    d_l, d_c, d_h = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(dh / 2)

    total = h1 + h2
    around = np.where(total < 2 * np.pi, total + 2 * np.pi, total - 2 * np.pi) / 2
    h = np.where(grey, total, np.where(far, around, total / 2))
    t = (
        1 - 0.17 * np.cos(h - np.pi / 6) + 0.24 * np.cos(2 * h)
        + 0.32 * np.cos(3 * h + np.pi / 30) - 0.20 * np.cos(4 * h - math.radians(63))
    )  # fmt: skip
    off, c = ((l1 + l2) / 2 - 50) ** 2, (c1 + c2) / 2
    s_l = 1 + 0.015 * off / np.sqrt(20 + off)
    s_c, s_h = 1 + 0.045 * c, 1 + 0.015 * c * t
    angle = math.radians(60) * np.exp(-(((np.degrees(h) - 275) / 25) ** 2))
    r = -2 * np.sqrt(c**7 / (c**7 + 25.0**7)) * np.sin(angle)
    x, y, z = d_l / s_l, d_c / s_c, d_h / s_h
    return np.sqrt(np.maximum(x**2 + y**2 + z**2 + r * y * z, 0))
