"""Arguments that are wrong, or so extreme that rounding would decide the result."""

from __future__ import annotations

import math

import numpy as np
import pytest

import convsv_core as convsv

CONV = convsv.Conv("OIW")
KERNEL = np.random.default_rng(0).normal(size=(2, 3, 3))


def test_a_set_is_no_input_shape():
    with pytest.raises(TypeError, match=r"input_shape=.*has no order"):
        convsv.operator_norm(np.ones((1, 1, 3, 3)), {8, 9}, convsv.Conv("OIHW"))


def test_a_masked_array_is_no_kernel():
    with pytest.raises(TypeError, match=r"MaskedArray, not an array"):
        convsv.operator_norm(np.ma.array(KERNEL, mask=KERNEL > 0), 8, CONV)


@pytest.mark.parametrize("name", ["norm_bounds", "nearest_orthogonal"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_traced_kernel_is_refused_where_values_are_read(name: str, library: str):
    calls = {
        "norm_bounds": lambda kernel: convsv.norm_bounds(kernel, CONV).upper,
        "nearest_orthogonal": lambda kernel: convsv.nearest_orthogonal(kernel, 8, CONV).kernel,
    }
    framework = pytest.importorskip(library)
    vmap = framework.func.vmap if library == "torch" else framework.vmap
    kernels = convsv.plugins.get_backend(library).asarray(np.stack([KERNEL, KERNEL]), dtype="float32")
    with pytest.raises(ValueError, match="kernel is traced: wanted an array with values"):
        vmap(calls[name])(kernels)


def test_torch_kernels_are_bounded_as_numpy_bounds_them():
    torch = pytest.importorskip("torch")
    names = ("lower", "upper", "left", "right")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128):
        kernel = torch.from_numpy(KERNEL).to(dtype)
        found = convsv.norm_bounds(kernel.requires_grad_(), CONV, input_shape=8)
        host = kernel.detach().float() if dtype == torch.bfloat16 else kernel.detach()
        wanted = convsv.norm_bounds(host.numpy(), CONV, input_shape=8)
        for name in names:
            one, other = getattr(found, name), getattr(wanted, name)
            assert isinstance(one, torch.Tensor)
            assert not one.requires_grad
            assert str(one.dtype) == f"torch.{other.dtype}"
            eps = 16 * np.finfo(other.dtype).eps if dtype == torch.bfloat16 else 0.0
            np.testing.assert_allclose(one.numpy(), other, rtol=eps, atol=eps)
        assert found.frequency == wanted.frequency


def test_an_empty_axis_is_named():
    with pytest.raises(ValueError, match="the axis O is empty"):
        convsv.operator_norm(KERNEL[:0], 8, CONV)


@pytest.mark.parametrize(
    "bound", [np.complex128(1 + 1j), np.asarray(1 + 1j), np.asarray(True), np.bool_(True), 1 + 0j, "1", None]
)
def test_a_bound_is_a_real_number(bound):
    with pytest.raises(TypeError, match=r"bound.*wanted a real number"):
        convsv.project(KERNEL, 8, CONV, bound)


def test_a_bound_beyond_the_range_changes_nothing():
    found = convsv.project(KERNEL, 8, CONV, 10**400)
    np.testing.assert_array_equal(found.kernel, KERNEL)
    with pytest.raises(ValueError, match="wanted a number of at least 0"):
        convsv.project(KERNEL, 8, CONV, -(10**400))


@pytest.mark.parametrize("taps", [[1.0, 0.0, -1.0], [1.0, -1.0]])
@pytest.mark.parametrize("rtol", [1e3, 1e10, 1e17, 1e300])
def test_the_upper_bound_holds_for_every_tolerance(taps, rtol):
    """The symbol of these kernels is 0 at the points of the coarsest grids, and its norm is 2."""
    kernel = np.asarray([[taps]])
    assert float(convsv.norm_upper_bound(kernel, CONV, rtol=rtol)) >= 2.0
    bounds = convsv.norm_bounds(kernel, CONV, rtol=rtol)
    assert float(bounds.lower) <= 2.0 <= float(bounds.upper)


@pytest.mark.parametrize("rtol", [1e-17, 1e-300])
def test_a_tolerance_below_rounding_is_not_reached_or_refused(rtol):
    bounds = convsv.norm_bounds(KERNEL, CONV, rtol=rtol, max_evaluations=200)
    assert 0 < float(bounds.lower) <= float(bounds.upper)
    assert not bounds.converged
    with pytest.raises(ValueError, match="wanted at least the rounding"):
        convsv.norm_upper_bound(KERNEL, CONV, rtol=rtol)


def test_a_state_of_another_kind_is_named():
    with pytest.raises(TypeError, match="state is a int"):
        convsv.project(KERNEL, 8, CONV, 0.1, state=1)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "gain=nan", {"gain": math.nan}),
        (TypeError, "gain='1'", {"gain": "1"}),
        (ValueError, "seed=-1", {"seed": -1}),
        (TypeError, "seed='1'", {"seed": "1"}),
        (ValueError, "dtype='int32': wanted one of float16", {"dtype": "int32"}),
        (ValueError, "dtype='float': wanted one of float16", {"dtype": "float"}),
        (TypeError, "kernel_shape.2.=3.5", {"kernel_shape": (4, 4, 3.5)}),
        (TypeError, "conv='OIW': wanted a convsv.Conv", {"conv": "OIW"}),
    ],
)
def test_orthogonal_kernel_names_the_wrong_argument(error, match, options):
    arguments = {"kernel_shape": (4, 4, 3), "input_shape": 8, "conv": CONV, **options}
    with pytest.raises(error, match=match):
        convsv.orthogonal_kernel(**arguments)
