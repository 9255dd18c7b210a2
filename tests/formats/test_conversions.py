"""The reference's element conversions against torch's: every pattern of the narrow types, and rounding into them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from formats import reference
from formats.reference import BF16, E4M3, E5M2, FP16, FP32, ElementType

TORCH = {BF16: torch.bfloat16, FP16: torch.float16, E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
SIGNED_INTEGER = {1: np.int8, 2: np.int16}
NARROW = pytest.mark.parametrize("element", TORCH, ids=lambda element: element.name)


def patterns(element: ElementType) -> npt.NDArray[np.unsignedinteger]:
    return np.arange(2 * element.sign, dtype=np.int64).astype(element.dtype)


def torch_values(element: ElementType) -> npt.NDArray[np.float32]:
    signed = patterns(element).view(SIGNED_INTEGER[element.nbytes])
    return torch.from_numpy(signed).view(TORCH[element]).float().numpy()


def torch_rounding(values: npt.NDArray[np.float32], element: ElementType) -> npt.NDArray[np.unsignedinteger]:
    integer = {1: torch.int8, 2: torch.int16}[element.nbytes]
    return torch.from_numpy(values).to(TORCH[element]).view(integer).numpy().view(element.dtype)


def assert_rounds_like_torch(values: npt.NDArray[np.float32], element: ElementType) -> None:
    """Where torch goes beyond the largest finite magnitude, the format saturates; NaN has one pattern, without sign."""
    ours, theirs = reference.from_float(values, element), torch_rounding(values, element)
    overflow = np.isfinite(values) & ~np.isfinite(torch_rounding_as_float(theirs, element))
    saturated = np.where(np.signbit(values), element.largest | element.sign, element.largest)
    expected = np.where(overflow, saturated, theirs)
    expected = np.where(np.isnan(values), element.nan, expected).astype(element.dtype)
    if element.infinity == element.nan:
        expected = np.where(np.isinf(values), element.nan, expected).astype(element.dtype)
    np.testing.assert_array_equal(ours, expected)


def torch_rounding_as_float(bits: npt.NDArray[np.unsignedinteger], element: ElementType) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = torch_values(element)[bits]
    return values


@NARROW
def test_every_pattern_decodes_as_in_torch(element: ElementType) -> None:
    ours, theirs = reference.to_float(patterns(element), element), torch_values(element)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])
    assert (ours.view(np.uint32)[nan] == FP32.nan).all()
    first_nan = element.largest + (1 if element.infinity == element.nan else 2)
    assert nan.sum() == 2 * (element.sign - first_nan)


@NARROW
def test_every_value_survives_the_round_trip(element: ElementType) -> None:
    values = reference.to_float(patterns(element), element)
    expected = np.where(np.isnan(values), element.nan, patterns(element)).astype(element.dtype)
    np.testing.assert_array_equal(reference.from_float(values, element), expected)


@NARROW
def test_rounding_at_and_around_every_tie(element: ElementType) -> None:
    """Between each finite magnitude and the next: the point midway and its neighbours in fp32, of both signs."""
    finite = np.arange(element.largest + 1).astype(element.dtype)
    values = reference.to_float(finite, element).astype(np.float64)
    midway = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    around = [midway, np.nextafter(midway, np.float32(np.inf)), np.nextafter(midway, np.float32(0))]
    magnitudes = np.concatenate(around)
    assert_rounds_like_torch(np.concatenate((magnitudes, -magnitudes)), element)


@NARROW
def test_rounding_of_random_patterns(element: ElementType) -> None:
    """Any fp32 bits: denormals, values beyond the target's range, Inf, NaN of either sign."""
    bits = np.random.default_rng(5).integers(0, 1 << 32, 500_000).astype(np.uint32)
    assert_rounds_like_torch(bits.view(np.float32), element)


@NARROW
@pytest.mark.parametrize("sign", [1, -1])
def test_saturation(element: ElementType, sign: int) -> None:
    largest = float(reference.to_float(np.array([element.largest], element.dtype), element)[0])
    values = np.array([largest, largest * (1 + 2**-20), 3.4028234663852886e38], np.float32) * np.float32(sign)
    expected = element.largest | (element.sign if sign < 0 else 0)
    assert reference.from_float(values, element).tolist() == [expected] * 3


@pytest.mark.parametrize(
    "element, largest", [(BF16, 3.3895314e38), (FP16, 65504.0), (E4M3, 448.0), (E5M2, 57344.0)], ids=lambda x: str(x)
)
def test_largest_magnitude(element: ElementType, largest: float) -> None:
    value = reference.to_float(np.array([element.largest], element.dtype), element)
    assert value[0] == np.float32(largest)


def test_infinity_and_nan() -> None:
    values = np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)
    expected = {
        FP32: [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC00000],
        BF16: [0x7F80, 0xFF80, 0x7FC0, 0x7FC0],
        FP16: [0x7C00, 0xFC00, 0x7E00, 0x7E00],
        E4M3: [0x7F, 0x7F, 0x7F, 0x7F],
        E5M2: [0x7C, 0xFC, 0x7E, 0x7E],
    }
    for element, bits in expected.items():
        assert reference.from_float(values, element).tolist() == bits, element.name


def test_fp32_is_kept_but_for_the_payload_of_nan() -> None:
    bits = np.array([0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32)
    kept = [0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0x7FC00000, 0x7FC00000]
    assert reference.from_float(bits.view(np.float32), FP32).tolist() == kept
    assert reference.to_float(bits, FP32).view(np.uint32).tolist() == kept
