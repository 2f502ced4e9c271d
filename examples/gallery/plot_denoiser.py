"""
A plug-and-play denoiser that cannot diverge
============================================

Plug-and-play methods put a trained denoiser :math:`D` where an algorithm has a proximal step. With a data term
:math:`f`, the iteration is :math:`x \\leftarrow D(x - \\nabla f(x))`. Nothing keeps it from diverging, unless the
denoiser is one of the maps for which the algorithm is proved.

Such a denoiser is :math:`D = (I + Q) / 2` with a network :math:`Q` that is 1-Lipschitz. Then :math:`D` and its
residual :math:`I - D` are firmly nonexpansive, and the iteration converges for every convex :math:`f` whose gradient
is 1-Lipschitz. In particular the steps of the iteration never get longer, which this page checks. (Pesquet, Repetti,
Terris and Wiaux, SIAM Journal on Imaging Sciences, 2021, train such networks with a penalty.)
"""

import itertools

import matplotlib.pyplot as plt
import torch
from convsv_adapters.torch import conv_layers, project_after_step

from convsv_core import norm_bounds

torch.manual_seed(0)


def draw_images(count, extent=32):
    """Return images of random rectangles."""
    images = torch.zeros(count, 1, extent, extent)
    for image in images:
        for _ in range(6):
            top, left = torch.randint(0, extent - 6, (2,))
            height, width = torch.randint(6, 20, (2,))
            image[0, top : top + height, left : left + width] = torch.rand(())
    return images


def make_network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 3, padding=1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.Conv2d(24, 24, 3, padding=1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.Conv2d(24, 1, 3, padding=1),
    )


def denoise(network, image):
    return (image + network(image)) / 2


# %%
# Both networks learn to remove noise. The first one has a bound of 1 on every convolution, after each step.
def train(network, bounded):
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    if bounded:
        project_after_step(optimizer, network, bound=1.0)
    torch.manual_seed(2)
    for _ in range(150):
        images = draw_images(8)
        loss = (denoise(network, images + 0.15 * torch.randn_like(images)) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


certified, free = make_network(), make_network()
for name, network, bounded in ("certified", certified, True), ("free", free, False):
    error = train(network, bounded)
    uppers = [float(norm_bounds(layer.weight.detach(), layer.conv).upper) for layer in conv_layers(network)]
    print(f"{name}: mean squared error {error:.4f}, norms {[round(one, 3) for one in uppers]}")

# %%
# Inpainting: half of the pixels are known. The gradient step puts the known pixels back, then the denoiser acts.
torch.manual_seed(3)
truth = draw_images(1)
known = (torch.rand_like(truth) < 0.5).float()
observed = known * truth


@torch.no_grad()
def restore(network, iterations=150):
    image, steps = observed.clone(), []
    for _ in range(iterations):
        following = denoise(network, image - known * (image - observed))
        steps.append(float((following - image).norm()))
        image = following
    return image, steps


restored, certified_steps = restore(certified)
_, free_steps = restore(free)
print("error before and after:", float((observed - truth).norm()), float((restored - truth).norm()))

figure = plt.figure(figsize=(9, 5), layout="constrained")
panels = figure.subplot_mosaic("abc;ddd", height_ratios=(1, 0.9))
shown = {"a": ("truth", truth), "b": ("half of the pixels", observed), "c": ("restored", restored)}
for place, (title, image) in shown.items():
    panels[place].imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
    panels[place].set_title(title)
    panels[place].set_axis_off()
panels["d"].semilogy(certified_steps, label="certified")
panels["d"].semilogy(free_steps, label="without a bound")
panels["d"].set_ylim(bottom=1e-7)  # the rounding of float32
panels["d"].set_xlabel("iteration")
panels["d"].set_ylabel("length of the step")
panels["d"].legend()
panels["d"].spines[["top", "right"]].set_visible(False)

# %%
# The steps of the certified iteration never get longer, up to the rounding of float32, whatever the image. The free
# network converges on this image too, but nothing promises it for the next one. The price of the promise is in the
# figures above: of two networks of this size, the free one removes more noise.
for earlier, later in itertools.pairwise(certified_steps):
    assert later <= earlier * (1 + 1e-4) + 1e-5
assert float((restored - truth).norm()) < float((observed - truth).norm())
