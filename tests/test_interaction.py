"Token interaction: precision, training of every part, and another modality in front of it."

import pytest
import torch
from torch import nn

from collat.interaction import TokenInteraction


@pytest.mark.parametrize('width', [None, 16])
def test_every_parameter_trains_in_bf16(width):
    torch.manual_seed(0)
    how = dict(width=width, start='learned', start_scale=0.05)
    m = TokenInteraction(5, 32, 24, depth=2, heads=2, **how)
    with torch.autocast('cpu', torch.bfloat16):
        h_at = m(torch.randn(3, 9, 24))
    h_at.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in m.parameters())


def test_maps_and_fused_kernel_agree_in_both_modes():
    torch.manual_seed(0)
    m = TokenInteraction(20, 64, 32, depth=8, start_scale=0.04)
    x = torch.randn(2, 147, 32)
    for mode in (True, False):
        m.train(mode)
        assert (m(x) - m(x, return_attn=True)[0]).abs().max() <= 1e-5


def test_weights_and_start_survive_a_round_trip():
    a, b = (TokenInteraction(4, 16, 8, depth=1, heads=2, seed=seed) for seed in (1, 2))
    x = torch.randn(2, 5, 8)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_resampled_starts_do_not_touch_the_global_generator():
    m = TokenInteraction(4, 16, 8, depth=1, heads=2, start='resample')
    x = torch.randn(2, 5, 8)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    m(x, seeds=torch.tensor([7, 8]))
    got = torch.rand(4)
    assert torch.equal(want, got)


def test_another_modality_in_front():
    "Image patches in, text tokens out: nothing in the module is about sound."
    torch.manual_seed(0)
    images = nn.Conv2d(3, 24, 8, 8)
    m = TokenInteraction(3, 16, 24, depth=2, heads=2, start_scale=0.1)
    pics = torch.rand(4, 3, 32, 32)
    target = 0.1 * torch.randn(4, 3, 16)
    opt = torch.optim.AdamW([*images.parameters(), *m.parameters()], lr=3e-3)
    losses = []
    for _ in range(300):
        loss = (m(images(pics).flatten(2).mT) - target).abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and images.weight.grad.abs().sum() > 0
