"""Penalties: the tests that the conformance suite does not ask of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from convsv_backends._numpy import NumpyBackend
from convsv_conformance.checks import penalties as check
from convsv_conformance.features import FEATURES
from convsv_conformance.table import by_name
from convsv_conformance.target import Failure, Ledger, Target
from penalty_cases import CALLS, CONV, EPS, HARD, random_kernel, unitary

import convsv_core as convsv
from convsv_core import Conv, penalties
from convsv_core.penalties import _gram
from convsv_core.plugins import get_backend

EVERY_SIZE = ("orthogonality", "frobenius", "schatten-4", "schatten-6")


# ---- normalisation ------------------------------------------------------------------------------------


def test_every_public_function_is_tried() -> None:
    assert set(penalties.__all__) == {name for name in CALLS if hasattr(penalties, name)} | {"schatten"}


@pytest.mark.parametrize("name", EVERY_SIZE)
@pytest.mark.parametrize("conv", [CONV, Conv("OIHW", stride=2), Conv("IOHW", stride=2, transposed=True)])
def test_a_weight_carries_over_between_image_sizes(name: str, conv: Conv) -> None:
    """Sums of even powers are means of trigonometric polynomials, which every grid that is large enough has alike."""
    kernel = random_kernel(4, 3, 3, 3)
    small, large = (float(CALLS[name](kernel, (extent, extent), conv)) for extent in (16, 32))
    assert abs(small - large) <= 50 * EPS * large


@pytest.mark.parametrize("name", CALLS)
def test_more_pixels_of_the_same_spectrum_change_nothing(name: str) -> None:
    """A kernel dilated by d on an image d times as large has each singular value d**2 times."""
    kernel = HARD["random"]
    one = float(CALLS[name](kernel, (4, 5), CONV))
    for dilation in (2, 3):
        many = float(CALLS[name](kernel, (4 * dilation, 5 * dilation), Conv("OIHW", dilation=dilation)))
        assert abs(one - many) <= 50 * EPS * abs(one)


def test_copies_of_a_pixel_change_nothing() -> None:
    """One tap has the same singular values at every frequency of every size."""
    kernel = random_kernel(4, 4, 1, 1)
    for call in CALLS.values():
        one, many = (float(call(kernel, extents, CONV)) for extents in ((1, 1), (6, 5)))
        assert abs(one - many) <= 20 * EPS * abs(one)


def test_orthogonality_on_the_infinite_lattice_is_that_of_a_large_image() -> None:
    for conv in (CONV, Conv("OIHW", stride=2), Conv("OIHW", dilation=3), Conv("IOHW", stride=3, transposed=True)):
        kernel = random_kernel(4, 3, 3, 3)
        lattice = float(penalties.orthogonality(kernel, None, conv))
        assert abs(lattice - float(penalties.orthogonality(kernel, 18, conv))) <= 50 * EPS * lattice


def test_orthogonality_is_zero_for_an_orthogonal_layer_alone() -> None:
    kernel = unitary()
    for extents in (None, (2, 3), (8, 8)):
        assert float(penalties.orthogonality(kernel, extents, CONV)) <= (20 * EPS) ** 2
    assert float(penalties.orthogonality(kernel[:2], (8, 8), CONV)) <= (20 * EPS) ** 2  # fewer outputs than inputs
    assert float(penalties.orthogonality(kernel[:, :2], (8, 8), CONV)) <= (20 * EPS) ** 2
    # A kernel may be orthogonal as a matrix, and its layer not: both taps at 1 / sqrt(2)
    assert float(penalties.orthogonality(np.full((1, 1, 2), math.sqrt(0.5)), 8, Conv("OIW"))) == pytest.approx(0.5)


def test_inputs_that_no_tap_reads_count_as_zeros() -> None:
    conv = Conv("OIW", stride=2)
    kernel = np.eye(3)[:, :2, None]  # 3 channels from 4 columns of which 2 are read
    assert float(penalties.orthogonality(kernel, 8, conv)) == pytest.approx(1.0)
    assert float(penalties.orthogonality(kernel, None, conv)) == pytest.approx(1.0)
    assert float(penalties.schatten(kernel, 8, conv, 1)) == pytest.approx(2.0)
    floor = 32 * EPS
    assert float(penalties.log_condition_number(kernel, 8, conv)) == pytest.approx(-math.log(floor))
    square = np.eye(4)[:, :2, None]
    assert float(penalties.negative_log_abs_det(square, 8, conv)) == pytest.approx(-2 * math.log(floor))


@pytest.mark.parametrize("shape", [(3, 2, 12, 12), (3, 2, 3, 3), (2, 5, 5, 4)])
@pytest.mark.parametrize("extents", [(2, 3), (5, 4), (32, 24)])
def test_gram_penalties_by_pairs_of_taps_and_by_frequencies_agree(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], extents: tuple[int, int]
) -> None:
    kernel = random_kernel(*shape)
    sigma = convsv.singular_values(kernel, extents, CONV)
    expected = (np.sum((sigma**2 - 1) ** 2) / math.prod(extents), np.sum(sigma**4) / math.prod(extents))
    scale = np.sum((sigma**2 + 1) ** 2) / math.prod(extents)
    for by_pairs in (True, False):
        monkeypatch.setattr(_gram, "_pairs_are_cheaper", lambda plan, by_pairs=by_pairs: by_pairs)
        got = (
            float(penalties.orthogonality(kernel, extents, CONV)),
            float(penalties.schatten(kernel, extents, CONV, 4)),
        )
        assert np.abs(np.subtract(got, expected)).max() <= 50 * EPS * scale


def test_many_taps_are_not_paired() -> None:
    """Of 31 x 31 taps there are a million pairs, and 3721 differences that would each be a product."""
    kernel = random_kernel(2, 1, 31, 31)
    conv = Conv("OIHW", groups=2)
    sigma = convsv.singular_values(kernel, 40, conv)
    got = float(penalties.orthogonality(kernel, 40, conv))
    assert got == pytest.approx(float(np.sum((sigma**2 - 1) ** 2)) / 1600, rel=1000 * EPS)


def test_the_log_of_the_norm_without_extents_is_that_of_the_certified_bound() -> None:
    for conv in (CONV, Conv("OIHW", stride=2, padding_mode="zeros"), Conv("IOHW", stride=2, transposed=True)):
        kernel = random_kernel(4, 3, 3, 3)
        for rtol in (0.1, 0.01):
            value = float(penalties.log_lipschitz(kernel, None, conv, rtol=rtol))
            upper = float(convsv.norm_upper_bound(kernel, conv, rtol=rtol))
            assert value == pytest.approx(math.log(upper), abs=4 * EPS)
            lower = math.log(float(convsv.norm_bounds(kernel, conv).lower))
            assert lower <= value <= lower + math.log1p(1.1 * rtol)


# ---- values at the edges --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_zero(name: str) -> None:
    value = float(CALLS[name](HARD["zero"], (4, 5), CONV))
    least = math.log(np.finfo(np.float64).smallest_normal)
    expected = {"orthogonality": 4.0, "negative_log_abs_det": -4 * least, "log_lipschitz": least}
    assert value == pytest.approx(expected.get(name, 0.0))


def test_a_floor_of_the_callers() -> None:
    kernel = np.diag([1.0, 1e-3])[:, :, None]
    arguments = (kernel, 4, Conv("OIW"))
    assert float(penalties.log_condition_number(*arguments, floor=1e-2)) == pytest.approx(math.log(100))
    assert float(penalties.log_condition_number(*arguments, floor=1e-4)) == pytest.approx(math.log(1000))
    assert float(penalties.negative_log_abs_det(*arguments, floor=1e-2)) == pytest.approx(math.log(100))
    assert float(penalties.negative_log_abs_det(*arguments)) == pytest.approx(math.log(1000))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("power", [-40, 30])
def test_the_scale_of_the_kernel_is_put_back(dtype: str, power: int) -> None:
    """Scaling by a power of two is exact, so what is homogeneous scales exactly too, and the rest as it must."""
    kernel, layer = random_kernel(3, 4, 3, 3).astype(dtype), ((4, 5), CONV)
    eps, factor = float(np.finfo(dtype).eps), 2.0**power
    scaled = (kernel * np.asarray(factor, dtype)).astype(dtype)
    for call, degree in (
        (penalties.squared_norm, 2),
        (lambda *given: penalties.schatten(*given, 3), 3),
        (lambda *given: penalties.schatten(*given, 4), 4),
        (penalties.log_condition_number, 0),
        (penalties.stable_rank, 0),
    ):
        if abs(power * degree) < 120:
            assert float(call(scaled, *layer)) == float(call(kernel, *layer)) * factor**degree
    for call in (penalties.norm_hinge, penalties.spectrum_hinge):
        assert float(call(scaled, *layer, 0.5 * factor)) == float(call(kernel, *layer, 0.5)) * factor**2
    # sum sigma^4 - 2 sum sigma^2 + number
    fourth, second = (float(penalties.schatten(scaled, *layer, p)) for p in (4, 2))
    expected = fourth - 2 * second + 3
    assert abs(float(penalties.orthogonality(scaled, *layer)) - expected) <= 50 * eps * (fourth + 2 * second + 3)


def test_padding_that_is_not_circular() -> None:
    kernel = np.ones((1, 1, 3, 3))
    conv = Conv("OIHW", padding_mode="zeros")
    norm = float(convsv.operator_norm(kernel, (8, 8), conv))
    assert float(penalties.squared_norm(kernel, (8, 8), conv)) == norm**2
    assert float(penalties.norm_hinge(kernel, (8, 8), conv, 2.0)) == pytest.approx((norm - 2) ** 2, rel=4 * EPS)
    assert float(penalties.log_lipschitz(kernel, (8, 8), conv)) == pytest.approx(math.log(norm), rel=4 * EPS)
    for name in sorted(set(CALLS) - {"log_lipschitz", "norm_hinge", "squared_norm"}):
        with pytest.raises(NotImplementedError, match="padding_mode='zeros'"):
            CALLS[name](kernel, (8, 8), conv)


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_bad_layers(name: str) -> None:
    kernel = random_kernel(4, 4, 3, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        CALLS[name](np.full_like(kernel, math.nan), (4, 4), CONV)
    with pytest.raises(TypeError, match="list"):
        CALLS[name](kernel.tolist(), (4, 4), CONV)
    with pytest.raises(TypeError, match="int64"):
        CALLS[name](kernel.astype(np.int64), (4, 4), CONV)
    with pytest.raises(ValueError, match="stride 2 does not divide"):
        CALLS[name](kernel, (5, 4), Conv("OIHW", stride=2))
    with pytest.raises(TypeError, match="conv='OIHW'"):
        CALLS[name](kernel, (4, 4), "OIHW")
    with pytest.raises(ValueError, match="layout"):
        CALLS[name](kernel[0], (4, 4), CONV)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: penalties.norm_hinge(k, 4, CONV, -1.0), ValueError, "bound=-1.0"),
        (lambda k: penalties.spectrum_hinge(k, 4, CONV, math.nan), ValueError, "bound=nan"),
        (lambda k: penalties.spectrum_hinge(k, 4, CONV, "1"), TypeError, "bound='1'"),
        (lambda k: penalties.schatten(k, 4, CONV, 0.5), ValueError, "p=0.5"),
        (lambda k: penalties.schatten(k, 4, CONV, math.inf), ValueError, "p=inf.*operator_norm"),
        (lambda k: penalties.schatten(k, 4, CONV, math.nan), ValueError, "p=nan"),
        (lambda k: penalties.schatten(k, 4, CONV, "2"), TypeError, "p='2'"),
        (lambda k: penalties.schatten(k, 4, CONV, True), TypeError, "p=True"),
        (lambda k: penalties.log_condition_number(k, 4, CONV, floor=0), ValueError, "floor=0"),
        (lambda k: penalties.negative_log_abs_det(k, 4, CONV, floor=1.0), ValueError, "floor=1.0"),
        (lambda k: penalties.log_condition_number(k, 4, CONV, floor="1"), TypeError, "floor='1'"),
        (lambda k: penalties.negative_log_abs_det(k[:2], 4, CONV), ValueError, "not square.*determinant"),
        (lambda k: penalties.negative_log_abs_det(k, 4, Conv("OIHW", stride=2)), ValueError, "not square"),
    ],
)
def test_bad_parameters(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(random_kernel(4, 4, 3, 3))


# ---- the check ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        {"svdvals": lambda right, array: right(array) * 1.0001, "eigvalsh": lambda right, array: right(array) * 1.0001},
        {"adjoint": lambda right, array: np.swapaxes(array, -1, -2)},
    ],
    ids=["values that are too large", "a dropped conjugate"],
)
def test_a_planted_wrong_backend_is_caught(
    monkeypatch: pytest.MonkeyPatch, mistake: dict[str, Callable[..., Any]]
) -> None:
    target, case = Target(get_backend("numpy"), "cpu", "complex64"), by_name("three-of-many-channels")[0]
    check.values(target, case, Ledger(target.eps))
    for name, wrong in mistake.items():
        right = getattr(NumpyBackend, name)
        monkeypatch.setattr(
            NumpyBackend, name, lambda self, array, right=right, wrong=wrong: wrong(lambda a: right(self, a), array)
        )
    with pytest.raises(Failure):
        check.values(target, case, Ledger(target.eps))


@pytest.mark.parametrize("name", sorted({name for name in CALLS if hasattr(penalties, name)} | {"schatten"}))
def test_a_wrong_penalty_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = by_name("orthogonal-1d")[0] if name == "orthogonality" else by_name("three-channels")[0]
    target = Target(get_backend("numpy"), "cpu", "float64")
    right = getattr(penalties, name)
    monkeypatch.setattr(penalties, name, lambda *given, **named: right(*given, **named) * (1 + 1e-6) + 1e-9)
    with pytest.raises(Failure, match=name):
        check.values(target, case, Ledger(target.eps))


@pytest.mark.parametrize("wrong", [1 + 1e-6, -1.0, math.nan])
def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    torch = pytest.importorskip("torch")
    case, target = by_name("stride")[0], Target(get_backend("torch"), "cpu", "float64")
    check.gradients(target, case, Ledger(target.eps))
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: (right(*given)[0] * wrong,))
    with pytest.raises(Failure, match="gradient of norm_hinge"):
        check.gradients(target, case, Ledger(target.eps))


def test_the_suite_asks_for_penalties() -> None:
    assert {"penalties", "penalties, gradients"} <= {feature.name for feature in FEATURES}
