"""List the convolutions that every backend is tried on, by geometry, and draw more of them at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convsv_conformance.cases import Case, make_case

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["GEOMETRIES", "TABLE", "by_name", "geometry_of", "random_cases"]

GEOMETRIES: dict[str, tuple[Case, ...]] = {
    "one dimension": (
        make_case("1d", (3, 2), (3,), (8,)),
        make_case("1d-even", (2, 3), (4,), (7,)),
        make_case("1d-one-channel", (1, 1), (3,), (6,)),
        make_case("1d-flax-layout", (3, 2), (3,), (7,), layout="WIO"),
        make_case("1d-stride", (3, 2), (5,), (9,), stride=3),
        make_case("1d-dilation", (2, 2), (3,), (9,), dilation=3),
        make_case("1d-kernel-larger-than-input", (2, 2), (7,), (4,)),
        make_case("1d-transposed", (2, 3), (4,), (5,), stride=2, transposed=True),
        make_case("1d-depthwise-dilated", (4, 4), (3,), (10,), dilation=2, groups=4),
    ),
    "extents": (
        make_case("2d", (4, 3), (3, 3), (6, 6)),
        make_case("rectangular", (3, 4), (3, 3), (5, 8)),
        make_case("odd-extents", (3, 3), (3, 3), (7, 5)),
        make_case("one-pixel", (3, 2), (3, 3), (1, 1)),
        make_case("one-pixel-wide", (2, 3), (3, 3), (1, 6)),
        make_case("two-pixels", (2, 2), (3, 3), (2, 2)),
    ),
    # Symbols whose smaller side is 1, 2 or 3 have closed forms.
    "channels": (
        make_case("tall", (6, 2), (3, 3), (4, 5)),
        make_case("wide", (2, 6), (3, 3), (4, 5)),
        make_case("one-input-channel", (5, 1), (3, 3), (4, 5)),
        make_case("one-output-channel", (1, 4), (3, 3), (4, 5)),
        make_case("three-channels", (3, 3), (3, 3), (4, 5)),
        make_case("three-of-many-channels", (3, 7), (2, 3), (4, 4)),
    ),
    "layout": (
        make_case("keras-layout", (3, 2), (3, 2), (4, 5), layout="HWIO"),
        make_case("mlx-layout", (3, 2), (3, 2), (4, 5), layout="OHWI"),
        make_case("outputs-second", (3, 2), (3, 2), (4, 5), layout="IOHW"),
        make_case("width-first", (3, 2), (2, 3), (5, 4), layout="OIWH"),
        make_case("scattered-layout", (3, 2), (3, 2), (4, 5), layout="HOWI"),
    ),
    "taps": (
        make_case("even", (3, 3), (2, 2), (5, 4)),
        make_case("taps-3-4", (2, 3), (3, 4), (6, 5)),
        make_case("taps-5-2", (3, 2), (5, 2), (6, 4)),
        make_case("one-tap", (4, 3), (1, 1), (4, 5)),
        make_case("one-tap-an-axis", (3, 3), (1, 5), (4, 6)),
        make_case("one-tap-other-axis", (3, 3), (4, 1), (5, 3)),
    ),
    # A kernel that is larger than the input is folded onto the input.
    "folded": (
        make_case("kernel-larger-than-input", (3, 3), (7, 5), (4, 3)),
        make_case("kernel-larger-in-one-axis", (2, 3), (3, 9), (6, 4)),
        make_case("dilated-beyond-input", (3, 2), (3, 3), (5, 6), dilation=4),
        make_case("dilated-onto-itself", (2, 2), (3, 3), (6, 4), dilation=(3, 2)),
    ),
    "stride": (
        make_case("stride", (3, 2), (3, 3), (6, 4), stride=2),
        make_case("stride-one-axis", (3, 2), (3, 3), (6, 3), stride=(2, 1)),
        make_case("stride-taps-3-4", (3, 2), (3, 4), (4, 6), stride=2),
        make_case("stride-taps-5-2", (3, 2), (5, 2), (6, 4), stride=2),
        make_case("stride-3-2", (4, 1), (3, 3), (6, 6), stride=(3, 2)),
        make_case("stride-of-the-taps", (4, 2), (2, 2), (6, 4), stride=2),
        make_case("stride-beyond-taps", (2, 2), (2, 1), (6, 6), stride=3),
        make_case("stride-of-one-tap", (3, 4), (1, 1), (4, 6), stride=2),
        make_case("stride-of-the-input", (3, 1), (3, 3), (2, 3), stride=(2, 3)),
        make_case("stride-many-outputs", (9, 2), (3, 3), (4, 4), stride=2),
        make_case("stride-kernel-larger", (2, 2), (5, 7), (4, 4), stride=2),
        make_case("stride-keras-layout", (3, 2), (3, 3), (6, 4), stride=(2, 1), layout="HWIO"),
    ),
    "dilation": (
        make_case("dilation", (3, 3), (3, 3), (7, 8), dilation=2),
        make_case("dilation-one-axis", (2, 3), (3, 2), (4, 7), dilation=(1, 3)),
        make_case("dilation-stride", (3, 2), (3, 3), (8, 6), dilation=(2, 3), stride=2),
    ),
    "groups": (
        make_case("groups", (4, 6), (3, 3), (4, 5), groups=2),
        make_case("groups-3", (3, 6), (3, 2), (4, 4), groups=3),
        make_case("depthwise", (4, 4), (3, 3), (5, 4), groups=4),
        make_case("depthwise-multiplier", (6, 3), (3, 3), (4, 4), groups=3),
        make_case("depthwise-stride", (4, 4), (3, 3), (6, 4), groups=4, stride=2),
        make_case("groups-stride-keras-layout", (4, 4), (3, 3), (4, 6), groups=2, stride=2, layout="HWIO"),
    ),
    "transposed": (
        make_case("transposed", (3, 2), (3, 3), (4, 5), transposed=True),
        make_case("transposed-stride", (2, 3), (3, 3), (3, 2), stride=2, transposed=True),
        make_case("transposed-stride-taps-4-2", (2, 3), (4, 2), (2, 3), stride=2, transposed=True),
        make_case("transposed-stride-one-axis", (2, 2), (3, 4), (3, 4), stride=(1, 2), transposed=True),
        make_case("transposed-keras-layout", (2, 3), (3, 2), (3, 4), stride=(2, 1), transposed=True, layout="HWOI"),
        make_case("transposed-groups", (4, 6), (3, 3), (3, 2), groups=2, stride=2, transposed=True),
        make_case("transposed-depthwise", (3, 3), (4, 4), (2, 3), groups=3, stride=2, transposed=True),
        make_case("transposed-dilation", (2, 3), (3, 2), (3, 4), dilation=(2, 3), stride=2, transposed=True),
        make_case("transposed-kernel-larger", (2, 2), (5, 7), (2, 2), stride=2, transposed=True),
    ),
    "padding": (
        make_case("padding-of-torch", (3, 2), (3, 5), (4, 6), padding=((1, 1), (2, 2))),
        make_case("padding-on-one-side", (3, 2), (3, 4), (5, 5), padding=((0, 2), (3, 0))),
        make_case("padding-of-torch-stride", (3, 2), (3, 3), (6, 4), stride=2, padding=((1, 1), (1, 1))),
        make_case("padding-transposed", (2, 3), (3, 3), (3, 2), stride=2, transposed=True, padding=((1, 1), (1, 1))),
    ),
    "three dimensions": (
        make_case("3d", (2, 2), (2, 3, 1), (3, 4, 2)),
        make_case("3d-keras-layout", (2, 3), (3, 2, 2), (2, 3, 3), layout="DHWIO"),
        make_case("3d-stride", (3, 1), (3, 3, 2), (4, 3, 2), stride=(2, 1, 2)),
        make_case("3d-depthwise-dilated", (3, 3), (2, 3, 2), (3, 5, 3), groups=3, dilation=(1, 2, 1)),
        make_case("3d-transposed", (2, 2), (2, 2, 3), (2, 2, 1), stride=(1, 2, 2), transposed=True),
    ),
    # These kernels are hard on an algorithm: their singular values vanish, meet or span many orders.
    "hard kernels": (
        make_case("zero", (3, 3), (3, 3), (4, 5), fill="zero"),
        make_case("identity", (3, 3), (3, 3), (4, 4), fill="identity"),
        make_case("one-hot", (3, 4), (3, 3), (4, 4), fill="one-hot"),
        make_case("orthogonal", (4, 4), (3, 3), (4, 5), fill="orthogonal"),
        make_case("orthogonal-1d", (5, 5), (4,), (8,), fill="orthogonal"),
        make_case("deficient", (4, 4), (3, 3), (4, 4), fill="deficient"),
        make_case("deficient-two-channels", (2, 2), (3, 3), (4, 4), fill="deficient"),
        make_case("deficient-three-channels", (3, 3), (3, 3), (4, 4), fill="deficient"),
        make_case("graded", (7, 7), (2, 2), (4, 4), fill="graded"),
        make_case("graded-two-channels", (2, 2), (3, 2), (4, 4), fill="graded"),
        make_case("graded-three-channels", (3, 3), (3, 2), (4, 4), fill="graded"),
        make_case("repeated", (6, 6), (3, 2), (4, 4), fill="repeated"),
        make_case("zero-stride", (2, 3), (3, 3), (4, 4), stride=2, fill="zero"),
        make_case("zero-depthwise", (3, 3), (3, 3), (4, 4), groups=3, fill="zero"),
    ),
}
"""The cases of the table, by the property of a layer that they vary.

The quick half of the suite takes cases of each geometry in each dtype; to add a case, put it into the list of its
geometry.
"""

TABLE = tuple(case for cases in GEOMETRIES.values() for case in cases)
"""Every case of the table."""

_GEOMETRY = {case.name: geometry for geometry, cases in GEOMETRIES.items() for case in cases}


def geometry_of(name: str) -> str:
    """Return the geometry of the case called `name`; "other" for a case that is not in the table."""
    return _GEOMETRY.get(name, "other")


def by_name(*names: str) -> tuple[Case, ...]:
    """Return the cases of the table that are called `names`."""
    cases = {case.name: case for case in TABLE}
    return tuple(cases[name] for name in names)


def random_cases() -> SearchStrategy[Case]:
    """Return a hypothesis strategy for convolutions of one to three dimensions whose matrix stays small."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        ndim = draw(st.integers(1, 3))
        largest = {1: 9, 2: 5, 3: 3}[ndim]

        def per_axis(low: int, high: int) -> tuple[int, ...]:
            return tuple(draw(st.integers(low, high)) for _ in range(ndim))

        stride = per_axis(1, min(3, largest))
        grid = tuple(draw(st.integers(1, max(1, largest // s))) for s in stride)
        transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3]))
        wide = tuple(n * s for n, s in zip(grid, stride, strict=True))
        return Case(
            name=f"random-{draw(st.integers(0, 999))}",
            channels=(groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))),
            taps=per_axis(1, largest),
            input_shape=grid if transposed else wide,
            layout="".join(draw(st.permutations("OI" + "DHW"[3 - ndim :]))),
            stride=stride,
            dilation=per_axis(1, 3),
            groups=groups,
            transposed=transposed,
        )

    return draw_case()
