"""JAX kernels on a mesh of eight virtual devices: equal values, equal shares, and no symbol that travels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

EPS = float(np.finfo(np.float32).eps)

# On few processors XLA starts fewer threads than eight devices wait with in two collectives at once, unless told.
ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "64", "JAX_PLATFORMS": "cpu"}

PROGRAM = """
import contextlib, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import convsv_core as convsv
from convsv_core import penalties

conv, extents = convsv.Conv("OIHW"), (16, 16)
host = np.random.default_rng(0).normal(size=(8, 6, 3, 3)).astype("float32")
kernel = jnp.asarray(host)

def mesh_of(kind):
    return jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))

def norm(kernel):
    return convsv.operator_norm(kernel, extents, conv)

def values(kernel):
    return convsv.singular_values(kernel, extents, conv)

def in_many_blocks(kernel):
    return convsv.singular_values(kernel, extents, conv, max_bytes=1 << 14)

def gradient(kernel):
    return jax.grad(lambda kernel: penalties.spectrum_hinge(kernel, extents, conv, 1.0))(kernel)

def mapped(kernel):
    return jax.vmap(norm)(jnp.stack([kernel, 2 * kernel]))

def error(got, wanted):
    return float(np.max(np.abs(np.asarray(got) - np.asarray(wanted))) / np.max(np.abs(np.asarray(wanted))))

def collectives(text):
    found = re.findall(r"= \\(?(\\w+)\\[([\\d,]*)\\]\\S* (all-\\w+|collective-\\w+|reduce-scatter)\\(", text)
    return [(name, dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape, name in found]

def decompositions(text):
    # Of batches of complex matrices: the first result has the shape (matrices, groups, rows, columns).
    return [int(n) for n in re.findall(r"= \\(c64\\[(\\d+),1,\\d+,\\d+\\].*lapack_c\\w+", text)]

report = {"errors": {}, "devices": {}}
"""


def run(code: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code + "\nprint(json.dumps(report))"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Each function compiled for a kernel that is split over a mesh: its errors, and what the program holds."""
    return run("""
mesh = mesh_of(AxisType.Explicit)
split = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("rows")))
report["programs"] = {}
for function in (norm, values, in_many_blocks, gradient, mapped):
    program = jax.jit(function).lower(split).compile()
    text, name = program.as_text(), function.__name__
    report["errors"][name] = error(program(split), jax.jit(function)(kernel))
    report["programs"][name] = [collectives(text), decompositions(text)]
""")


def test_values_on_a_mesh_are_those_of_one_device(compiled: dict[str, Any]) -> None:
    assert set(compiled["errors"]) == {"norm", "values", "in_many_blocks", "gradient", "mapped"}
    assert max(compiled["errors"].values()) <= 20 * EPS


def test_each_device_decomposes_an_eighth(compiled: dict[str, Any]) -> None:
    visited = 16 * 16 // 2 - 2  # those in pairs; four are their own conjugates
    for name in ("norm", "values", "gradient"):
        assert compiled["programs"][name][1] == [-(-visited // 8)], name


def test_results_are_gathered_and_never_the_symbol(compiled: dict[str, Any]) -> None:
    for name, (found, _) in compiled["programs"].items():
        assert any(kind == "all-reduce" or kind == "all-gather" for kind, _, _ in found), name
        # Matrices by frequency are complex. The largest thing that may travel is a real number for each value.
        assert {dtype for _, dtype, _ in found} <= {"f32", "pred", "s32"}, name
        largest = max(int(np.prod(shape)) for _, _, shape in found)
        assert largest <= max(128 * 6, 2 * 8 * 6 * 9), name
        assert largest < 126 * 8 * 6, name


@pytest.mark.thorough
def test_a_kernel_on_a_mesh_or_a_mesh_in_effect_is_all_it_takes() -> None:
    report = run("""
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind)
    for spec in (PartitionSpec(), PartitionSpec("rows", "columns")):
        placed = jax.device_put(kernel, NamedSharding(mesh, spec))
        report["errors"][f"eager {kind} {spec}"] = error(norm(placed), norm(kernel))
    with jax.set_mesh(mesh):
        text = jax.jit(norm).lower(kernel).compile().as_text()
        report["devices"][str(kind)] = decompositions(text)
        report["errors"][f"set_mesh {kind}"] = error(jax.jit(norm)(kernel), norm(kernel))
        report["errors"][f"gradient {kind}"] = error(gradient(kernel), jax.jit(gradient)(host))
# What looks at values goes on with a copy on every device, and a user's own shard_map keeps its devices to itself.
mesh = mesh_of(AxisType.Explicit)
placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("rows")))
bounds = convsv.norm_bounds(placed, conv)
report["inside"] = bool(norm(kernel) <= bounds.upper)
kernels = jnp.stack([kernel * (i + 1) for i in range(8)])
with jax.set_mesh(mesh_of(AxisType.Auto)):
    spec = PartitionSpec(("rows", "columns"))
    each = jax.jit(jax.shard_map(jax.vmap(norm), in_specs=spec, out_specs=spec))(kernels)
report["errors"]["shard_map"] = error(each, norm(kernel) * jnp.arange(1, 9))
""")
    assert len(report["errors"]) == 9
    assert max(report["errors"].values()) <= 20 * EPS
    assert all(found == [16] for found in report["devices"].values())
    assert report["inside"]
