"""ΔE2000 on its authors' test pairs, and the fast L*a*b* against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from flux2.data import signs
from rewards.colour import delta_e, lab

# Sharma, Wu and Dalal 2005, table 1: L1 a1 b1 L2 a2 b2 ΔE00.
PAIRS = np.array(
    """
    50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
    50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
    50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
    50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
    50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
    50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
    50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
    50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
    50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
    50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
    50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
    50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
    50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
    50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
    50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
    50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
    50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
    50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
    50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
    50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
    50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
    50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
    50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
    50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
    60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
    63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
    61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
    35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
    22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
    36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
    90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
    90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
    6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
    2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
    """.split(),  # noqa: SIM905 (a table)
    float,
).reshape(-1, 7)


def test_delta_e_2000_of_the_published_pairs() -> None:
    a, b, wanted = PAIRS[:, :3], PAIRS[:, 3:6], PAIRS[:, 6]
    assert len(PAIRS) == 34
    np.testing.assert_allclose(delta_e(a, b), wanted, atol=5.1e-5)
    np.testing.assert_allclose(delta_e(b, a), wanted, atol=5.1e-5)


def test_delta_e_of_black_and_white_is_100_and_of_equals_0() -> None:
    grey = np.array([[0.0, 0, 0], [100.0, 0, 0]])
    np.testing.assert_allclose(delta_e(grey[0], grey[1]), 100, atol=1e-9)
    np.testing.assert_allclose(delta_e(PAIRS[:, :3], PAIRS[:, :3]), 0, atol=1e-9)


def test_delta_e_in_fp32_is_that_in_fp64() -> None:
    colours = lab(np.stack([signs.rgb(c) for c in signs.CUBE]))
    wide = colours.astype(np.float64)
    single, double = delta_e(colours[:, None], colours), delta_e(wide[:, None], wide)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=1e-3)


def test_lab_is_the_definition() -> None:
    values = np.array([0, 3, 10, 11, 40, 128, 200, 255], np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), -1)
    np.testing.assert_allclose(lab(colours), signs.lab(colours), atol=1e-3)


def test_lab_of_the_primaries() -> None:
    # Bruce Lindbloom's calculator, sRGB under D65.
    primaries = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    wanted = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0]]
    np.testing.assert_allclose(lab(primaries), wanted, atol=0.02)


def test_lab_refuses_floats() -> None:
    with pytest.raises(ValueError, match="uint8"):
        lab(np.zeros((2, 3)))
