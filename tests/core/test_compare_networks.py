"""Tests of the constants of whole networks beside a comparison of their layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convsv_core as convsv


def test_the_constants_of_both_networks_stand_beside_the_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.mul_(0.5)
    image = torch.zeros(1, 2, 8, 8)
    found = convsv.compare(model, other, image, lipschitz=True)
    wanted = [convsv.lipschitz(one, image, lower=False).upper for one in (model, other)]
    assert [one.upper for one in found.lipschitz] == wanted
    assert wanted[1] == pytest.approx(wanted[0] / 2)
    assert found.lipschitz[0].upper_text in str(found)
    assert found[:1].lipschitz == found.lipschitz
    assert not convsv.compare(model, other).lipschitz
