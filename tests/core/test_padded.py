"""The operator of a layer under any padding, and its norm, against dense matrices and PyTorch's convolutions."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from padded_cases import Case, cases

from convsv_core import Conv, norm_bounds, operator_norm
from convsv_core._norm import lanczos, padded
from convsv_core._norm.padded import make_padded_operator, padded_operator_norm

EPS = np.finfo(np.float64).eps
UNITS = 64
"""Tolerance of values, in units of eps times the norm; LAPACK's own error on these matrices is about 10."""


CASES = cases()


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def iterative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small operators by the iteration too, with restarts."""
    monkeypatch.setattr(padded, "DENSE_SIDE", 0)
    monkeypatch.setattr(lanczos, "BASIS", 10)


def close(value: Any, truth: float, *, eps: float = EPS) -> bool:
    return abs(float(value) - truth) <= UNITS * eps * truth


def channels_first(operator_shape: tuple[int, int, int], images: Any) -> Any:
    """From (..., groups, pixels, channels) to the order of the dense matrix."""
    assert images.shape[-3:] == operator_shape
    return np.moveaxis(images, -1, -2).reshape(*images.shape[:-3], -1)


# ---- the operator --------------------------------------------------------------------------------------


@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
def test_operator_is_the_dense_matrix(case: Case, complex_values: bool) -> None:
    kernel = case.kernel(complex_values=complex_values)
    operator = make_padded_operator(kernel, case.input_shape, case.conv)
    groups, pixels, channels = operator.input_shape
    size = groups * pixels * channels
    # an identity in the dense matrix's order of channels and pixels
    identity = np.moveaxis(np.eye(size).reshape(size, groups, channels, pixels), -1, -2)
    columns = channels_first(operator.output_shape, operator.apply(identity.astype(kernel.dtype)))
    matrix = case.matrix(kernel)
    assert np.abs(columns.T * float(operator.operand.scale) - matrix).max() <= UNITS * EPS * np.abs(matrix).max()


def test_adjoint(case: Case) -> None:
    rng = np.random.default_rng(0)
    operator = make_padded_operator(case.kernel(complex_values=True), case.input_shape, case.conv)
    x, y = (
        rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        for shape in (operator.input_shape, operator.output_shape)
    )
    one, other = np.vdot(y, operator.apply(x)), np.vdot(operator.adjoint(y), x)
    scale = np.linalg.norm(operator.apply(x)) * np.linalg.norm(y)
    assert abs(one - other) <= UNITS * EPS * scale


# ---- the norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
def test_norm(case: Case, complex_values: bool) -> None:
    kernel = case.kernel(complex_values=complex_values)
    assert close(padded_operator_norm(kernel, case.input_shape, case.conv), case.norm(kernel))


@pytest.mark.usefixtures("iterative")
@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
def test_norm_by_iteration(case: Case, complex_values: bool) -> None:
    kernel = case.kernel(complex_values=complex_values)
    value, truth = padded_operator_norm(kernel, case.input_shape, case.conv), case.norm(kernel)
    assert close(value, truth)
    assert abs(value - truth) <= 1e-5 * truth  # what the project has promised, whatever UNITS is


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("channels", [(8, 8), pytest.param((4, 12), marks=pytest.mark.thorough), (12, 3)], ids=str)
def test_norm_of_larger_images(mode: str, channels: tuple[int, int]) -> None:
    case = Case((*channels, 3, 3), (12, 11), Conv("OIHW", padding=(2, 1), padding_mode=mode))
    kernel = case.kernel()
    assert close(padded_operator_norm(kernel, case.input_shape, case.conv), case.norm(kernel))


def test_norm_of_a_circulant_layer() -> None:
    from convsv_core import operator_norm

    kernel, conv = np.random.default_rng(0).standard_normal((4, 4, 3, 3)), Conv("OIHW")
    assert close(padded_operator_norm(kernel, (16, 15), conv), float(operator_norm(kernel, (16, 15), conv)))


@pytest.mark.usefixtures("iterative")
@pytest.mark.parametrize("noise", [0.0, 1e-14, 1e-10, 1e-6, 1e-3])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (6, 1)], ids=str)
def test_norm_of_close_singular_values(noise: float, ranks: tuple[int, int]) -> None:
    """A layer of multiples of the identity: two values, many times over, and what noise makes of them."""
    rng = np.random.default_rng(3)
    kernel = np.diag(np.repeat([1.0, 0.9], ranks))[:, :, None, None] * np.eye(3)[1][:, None] * np.eye(3)[1]
    kernel = kernel + noise * rng.standard_normal(kernel.shape)
    case = Case(kernel.shape, (7, 6), Conv("OIHW", padding_mode="zeros"))
    value, truth = padded_operator_norm(kernel, case.input_shape, case.conv), case.norm(kernel)
    assert truth - EPS**lanczos.RESIDUAL_EXPONENT * truth <= value <= truth + UNITS * EPS * truth


@pytest.mark.usefixtures("iterative")
def test_norm_of_twins() -> None:
    """Two groups whose norms nearly agree, and which no application of the operator mixes."""
    kernel = np.random.default_rng(0).standard_normal((1, 1, 3, 3))
    for difference in (0.0, 1e-13, 1e-9, 1e-6, 1e-4):
        twins = np.concatenate([kernel, kernel * (1 + difference)])
        case = Case(twins.shape, (8, 8), Conv("OIHW", groups=2, padding_mode="zeros"))
        truth = case.norm(twins)
        # Twins closer than the residual that ends the iteration cannot be told apart by it.
        assert abs(padded_operator_norm(twins, (8, 8), case.conv) - truth) <= 1e-11 * truth


@pytest.mark.parametrize("size", [(4, 4), (9, 8)], ids=["dense", "iterative"])
def test_degenerate_kernels(size: tuple[int, int]) -> None:
    conv = Conv("OIHW", padding_mode="zeros")
    assert padded_operator_norm(np.zeros((3, 3, 3, 3)), size, conv) == 0
    rng = np.random.default_rng(0)
    rank_one = rng.standard_normal((3, 1, 1, 1)) * rng.standard_normal((1, 3, 1, 1)) * np.ones((3, 3))
    for kernel in (rank_one, np.ones((2, 2, 3, 3)), np.eye(3)[:, :, None, None], 1e-200 * rank_one, 1e200 * rank_one):
        case = Case(kernel.shape, size, conv)
        scale = np.abs(kernel).max()
        assert close(padded_operator_norm(kernel, size, conv) / scale, case.norm(kernel / scale))


# ---- failures of other libraries, which these cases were taken from --------------------------------------


@pytest.mark.parametrize("taps", [(5, 1), (4, 2), (1, 5), (2, 4)], ids=str)
def test_tall_kernels(taps: tuple[int, int]) -> None:
    """Reported as 0.54 for 0.81 by one that pads the wrong axis."""
    for seed in range(5):
        kernel = np.random.default_rng(seed).standard_normal((3, 3, *taps)) / 8
        case = Case(kernel.shape, (9, 9), Conv("OIHW", padding_mode="zeros"))
        assert close(padded_operator_norm(kernel, (9, 9), case.conv), case.norm(kernel))


def test_even_kernels_with_one_output_more() -> None:
    """Reported as 7.75 for 10.97 by one that takes ``padding=k // 2`` for circulant."""
    kernel = np.random.default_rng(0).standard_normal((2, 2, 4, 4))
    case = Case(kernel.shape, (6, 6), Conv("OIHW", padding=2))
    truth = case.norm(kernel)
    assert case.matrix(kernel).shape == (98, 72)
    assert close(padded_operator_norm(kernel, (6, 6), case.conv), truth)
    circulant = Case(kernel.shape, (6, 6), Conv("OIHW")).norm(kernel)
    assert circulant < truth <= 2 * circulant * (1 + UNITS * EPS)


# ---- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["same-zeros", "even-circular", "strided-reflect", "transposed-replicate", "3d-zeros"])
@pytest.mark.parametrize("method", ["dense", "iterative"])
@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
def test_gradient(name: str, method: str, complex_values: bool, request: pytest.FixtureRequest) -> None:
    """Against central differences of the dense norm, along the gradient and a random direction."""
    torch = pytest.importorskip("torch")
    if method == "iterative":
        request.getfixturevalue("iterative")
    case = CASES[name]
    kernel = case.kernel(complex_values=complex_values)
    leaf = torch.tensor(kernel, requires_grad=True)
    padded_operator_norm(leaf, case.input_shape, case.conv).backward()
    gradient = leaf.grad.numpy()
    step = EPS ** (1 / 3)
    other = np.random.default_rng(9).standard_normal(kernel.shape)
    for direction in (gradient / np.linalg.norm(gradient), other / np.linalg.norm(other)):
        ahead, behind = (case.norm(kernel + sign * step * direction) for sign in (1, -1))
        slope = np.sum(np.real(np.conj(gradient) * direction))
        assert abs((ahead - behind) / (2 * step) - slope) <= 1e3 * step**2 * case.norm(kernel)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_gradient_is_that_of_the_svd(mode: str) -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.tensor(np.random.default_rng(0).standard_normal((3, 2, 3, 3)), requires_grad=True)
    identity = torch.eye(2 * 42, dtype=kernel.dtype).reshape(-1, 2, 7, 6)
    wide = torch.nn.functional.pad(identity, (1, 1, 1, 1), "constant" if mode == "zeros" else mode)
    images = torch.nn.functional.conv2d(wide, kernel).reshape(2 * 42, -1)
    (theirs,) = torch.autograd.grad(torch.linalg.svdvals(images)[0], kernel)
    conv = Conv("OIHW", padding=1, padding_mode=mode)
    (ours,) = torch.autograd.grad(padded_operator_norm(kernel, (7, 6), conv), kernel)
    # vectors have an error of eps * norm / gap
    assert (ours - theirs).abs().max() <= 1e4 * EPS


@pytest.mark.parametrize("size", [(4, 4), (9, 8)], ids=["dense", "iterative"])
def test_gradient_at_the_zero_kernel(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.zeros((3, 3, 3, 3), requires_grad=True)
    padded_operator_norm(kernel, size, Conv("OIHW", padding_mode="zeros")).backward()
    assert (kernel.grad == 0).all()


# ---- libraries -----------------------------------------------------------------------------------------

SINGLE = pytest.param("jax-single", marks=pytest.mark.thorough)
TRACED = Case((4, 3, 3, 3), (9, 8), Conv("OIHW", stride=(1, 2), padding=1, padding_mode="reflect"))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", SINGLE, "array_api_strict"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("size", [(5, 6), (9, 8)], ids=["dense", "iterative"])
def test_libraries(library: str, dtype: str, size: tuple[int, int]) -> None:
    xp = pytest.importorskip({"jax-single": "jax"}.get(library, library))
    xp = xp.numpy if library.startswith("jax") else xp
    single = library == "jax-single"
    if not hasattr(xp, dtype) or (single and dtype in ("float64", "complex128")):
        pytest.skip("not a dtype of this library")
    case = Case((4, 3, 3, 3), size, Conv("OIHW", padding=1, padding_mode="replicate"))
    kernel = case.kernel(complex_values=dtype.startswith("complex")).astype(dtype)
    answered = "float64" if dtype in ("float64", "complex128") else "float32"
    with precision(single):
        value = padded_operator_norm(xp.asarray(kernel), case.input_shape, case.conv)
        assert value.shape == ()
        assert value.dtype == getattr(xp, answered)
        wide = kernel.astype(np.complex128 if dtype.startswith("complex") else np.float64)
        assert close(value, case.norm(wide), eps=np.finfo(answered).eps)


def precision(single: bool) -> contextlib.AbstractContextManager[Any]:
    if not single:
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(False)


def traced_norm(values: Any) -> Any:
    return padded_operator_norm(values, TRACED.input_shape, TRACED.conv)


@pytest.mark.parametrize("method", [pytest.param("dense", marks=pytest.mark.thorough), "iterative"])
def test_jax_compiles_the_norm_and_its_gradient(method: str, request: pytest.FixtureRequest) -> None:
    jax = pytest.importorskip("jax")
    if method == "iterative":
        request.getfixturevalue("iterative")
    kernel, truth = TRACED.kernel(), TRACED.norm(TRACED.kernel())
    rtol = 1e-9 if method == "iterative" else UNITS * EPS  # so few vectors converge slowly
    norm, array = jax.jit(traced_norm), jax.numpy.asarray(kernel)
    assert abs(float(norm(array)) - truth) <= rtol * truth
    assert math.isnan(norm(array.at[0, 0, 0, 0].set(math.nan)))
    gradient = np.asarray(jax.jit(jax.grad(traced_norm))(array))
    assert float(np.sum(gradient * kernel)) == pytest.approx(truth, rel=rtol)  # Euler: homogeneous


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dense", "iterative"])
def test_jax_transformations(method: str, request: pytest.FixtureRequest) -> None:
    jax = pytest.importorskip("jax")
    if method == "iterative":
        request.getfixturevalue("iterative")
    kernel, truth = jax.numpy.asarray(TRACED.kernel()), TRACED.norm(TRACED.kernel())
    several = jax.numpy.stack([kernel, -3 * kernel, jax.numpy.zeros(kernel.shape)])
    rtol = 1e-9 if method == "iterative" else UNITS * EPS
    mapped = np.asarray(jax.vmap(traced_norm)(several))
    assert np.abs(mapped - truth * np.asarray([1, 3, 0])).max() <= 3 * rtol * truth
    eager, compiled = jax.grad(traced_norm)(kernel), jax.jit(jax.grad(traced_norm))(kernel)
    assert float(abs(eager - compiled).max()) <= 10 * math.sqrt(rtol)
    assert np.isfinite(np.asarray(jax.jit(jax.vmap(jax.grad(traced_norm)))(several))).all()


def test_torch_transformations() -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.from_numpy(TRACED.kernel())
    both = torch.func.vmap(traced_norm)(torch.stack([kernel, -3 * kernel]))
    assert close(both[0], TRACED.norm(kernel.numpy()))
    assert close(both[1], 3 * TRACED.norm(kernel.numpy()))
    gradient = torch.func.grad(traced_norm)(kernel)
    assert close(torch.sum(gradient * kernel), TRACED.norm(kernel.numpy()))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no memory to speak of the basis shrinks, and the answer stays."""
    monkeypatch.setattr(lanczos, "BASIS_BYTES", 1)
    case = Case((6, 6, 3, 3), (10, 10), Conv("OIHW", padding_mode="zeros"))
    kernel = case.kernel()
    assert close(padded_operator_norm(kernel, case.input_shape, case.conv), case.norm(kernel))


def test_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However hard the kernel; the value so far is below the norm and not far from it."""
    monkeypatch.setattr(lanczos, "MOST_CYCLES", 1)
    case = Case((8, 8, 3, 3), (16, 16), Conv("OIHW", padding_mode="zeros"))
    kernel = case.kernel()
    truth = case.norm(kernel)
    assert 0.99 * truth <= padded_operator_norm(kernel, case.input_shape, case.conv) < truth


# ---- wrong calls ---------------------------------------------------------------------------------------


def test_wrong_kernels() -> None:
    conv = Conv("OIW", padding_mode="zeros")
    with pytest.raises(ValueError, match="NaN"):
        padded_operator_norm(np.full((1, 1, 3), np.nan), (4,), conv)
    with pytest.raises(TypeError, match="dtype"):
        padded_operator_norm(np.ones((1, 1, 3), int), (4,), conv)
    with pytest.raises(TypeError, match="conv="):
        padded_operator_norm(np.ones((1, 1, 3)), (4,), "OIW")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases().values(), ids=cases().keys())
def test_public_calls_take_any_padding(case: Case) -> None:
    kernel = case.kernel()
    truth = case.norm(kernel)
    assert abs(float(operator_norm(kernel, case.input_shape, case.conv)) - truth) <= UNITS * EPS * truth
    bounds = norm_bounds(kernel, case.conv, input_shape=case.input_shape)
    assert bounds.lower <= truth * (1 + UNITS * EPS)
    assert truth <= bounds.upper * (1 + UNITS * EPS)
    assert bounds.converged == (bounds.upper <= (1 + 1e-3) * bounds.lower)
