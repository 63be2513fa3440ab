"""Matching against a literal loop, and what it costs in time and memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from collat.losses import MATCHERS, CoLLATLoss, greedy_match, hungarian_match, match, match_cost, pairwise_distance
from collat.text_encoder import LABEL, PAD, TEMPLATE


def literal(D, mask):
    free = list(range(len(D)))
    out = [None] * len(D)
    for i in reversed(range(len(D))):
        if mask is None or mask[i]:
            out[i] = min(free, key=lambda j: (D[i][j], j))
            free.remove(out[i])
    for i in range(len(D)):
        if out[i] is None:
            out[i] = free.pop(0)
    return out


@pytest.fixture
def one_thread():
    k = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(k)


@pytest.mark.parametrize('masked', [False, True])
def test_greedy_is_the_literal_loop(masked):
    """1,000 cases of 1 to 20 tokens with integer coordinates.
    There are ties, repeated predictions, repeated words, and padding of every length."""
    g = torch.Generator().manual_seed(0)
    n_ties = 0
    for trial in range(100):
        n = 1 + trial % 20
        h_t, h_at = torch.randint(-1, 2, (2, 10, n, 3), generator=g).float()
        length = torch.randint(0, n + 1, (10,), generator=g)
        words = torch.arange(n) < length[:, None]
        h_t[~words] = 0.0
        h_at[::2, n // 2 :] = h_at[::2, :1]
        D = pairwise_distance(h_at, h_t)
        n_ties += (D.sort(-1).values.diff(dim=-1) == 0).any(-1).any(-1).sum().item()
        mask = words if masked else None
        masks = words.tolist() if masked else [None] * 10
        assert greedy_match(D, mask).tolist() == [literal(d, m) for d, m in zip(D.tolist(), masks)]
    assert n_ties > 800


@pytest.mark.parametrize('name', MATCHERS)
def test_always_a_permutation(name):
    D = torch.rand(16, 9, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(16, 9) < 0.5
    for d in (D, D.bfloat16(), D.double(), D * 1e-30, D * 1e30, torch.full_like(D, torch.nan), D[:0]):
        for m in (None, mask[: len(d)]):
            assert (match(name)(d, m).sort(1).values == torch.arange(9)).all()


@pytest.mark.clock
def test_time(one_thread):
    "Distance and matching take at most 1.5 times torch.cdist(p=1)."
    h_at, h_t = torch.randn(2, 64, 77, 768, generator=torch.Generator().manual_seed(0))

    def seconds(f):
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    distance = []
    matching = []
    for _ in range(4):
        distance.append(seconds(lambda: torch.cdist(h_t, h_at, p=1)))
        matching.append(seconds(lambda: greedy_match(pairwise_distance(h_at, h_t))))
    assert min(matching) <= 1.5 * min(distance), (matching, distance)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from collat.losses import *
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
def once(b):
    h_at, h_t = torch.randn(2, b, 77, 768)
    start = peak()
    greedy_match(pairwise_distance(h_at, h_t))
    return peak() - start
once(1); print(once(256))
"""


def test_memory():
    "Extra memory of distance and matching at b=256, n=77, d=768 in GiB; a (b, n, n, d) tensor would be 4.3."
    root = str(Path(__file__).parents[1])
    p = subprocess.run([sys.executable, '-c', MEMORY, root], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    assert float(p.stdout) <= 1, p.stdout


@pytest.mark.parametrize('norm', ['scaled', 'mean', 'sum'])
def test_gradient_is_that_of_finite_differences(norm):
    g = torch.Generator().manual_seed(0)
    h_at, noisy, h_t = torch.randn(3, 3, 4, 2, generator=g, dtype=torch.float64)
    z_a, z_t = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    loss = CoLLATLoss({'cross_token': 1.0, 'global': 0.5, 'uni_token': 0.2}, norm=norm, embed_scale=0.3)
    ids = torch.tensor([5, 5, 6])
    scale = torch.tensor(3.0, dtype=torch.float64)

    def f(h_at, z_a, z_t, scale, noisy):
        return loss(h_at, h_t, z_a, z_t, scale, noisy, text_ids=ids)['loss']

    inputs = [x.clone().requires_grad_() for x in (h_at, z_a, z_t, scale, noisy)]
    assert torch.autograd.gradcheck(f, inputs)


def test_autocast_does_not_round():
    g = torch.Generator().manual_seed(0)
    h_at, noisy, h_t = torch.randn(3, 4, 6, 8, generator=g)
    z_a, z_t = torch.randn(2, 4, 8, generator=g)
    loss = CoLLATLoss()
    args = (h_at, h_t, z_a, z_t, torch.tensor(50.0), noisy)
    ids = torch.arange(4)
    with torch.autocast('cpu', torch.bfloat16):
        a = loss(*args, text_ids=ids)
    assert a['loss'] == loss(*args, text_ids=ids)['loss']


def test_hungarian_is_never_worse():
    D = torch.rand(200, 12, 12, generator=torch.Generator().manual_seed(0))
    optimal = match_cost(D, hungarian_match(D))
    for name in MATCHERS:
        assert (match_cost(D, match(name)(D)) >= optimal - 1e-5).all()


def test_order_of_predictions_does_not_matter():
    "Eq. 1 is the same whatever the order of the predictions; kinds are logged apart."
    g = torch.Generator().manual_seed(0)
    h_at, h_t = torch.randn(2, 4, 6, 8, generator=g)
    kind = torch.tensor([TEMPLATE] * 2 + [LABEL] * 2 + [PAD] * 2).expand(4, 6)
    for name in ('greedy', 'hungarian'):
        loss = CoLLATLoss(dict(cross_token=1.0), matcher=name)
        shuffled = h_at[:, torch.randperm(6, generator=g)]
        a, b = (loss(x, h_t, None, None, None, kind=kind) for x in (h_at, shuffled))
        assert a.keys() == b.keys() == {'loss', 'cross_token', 'dist_label', 'dist_template', 'dist_padding'}
        for k in a:
            torch.testing.assert_close(a[k], b[k])
