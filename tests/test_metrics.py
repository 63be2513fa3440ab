"Metrics: invariances, extreme cases and the AudioCaps protocol (the literal loops are in nbs/03_metrics.ipynb)."

import numpy as np
import pandas as pd
import pytest
import torch

from collat.metrics import (
    accuracy,
    average_precision_at_k,
    bootstrap_ci,
    clipwise_map,
    first_rank,
    mean_average_precision,
    mrr,
    paired_bootstrap,
    query_ap,
    recall_at_k,
    relevance,
    resample_counts,
    resampled_map,
)


def random_case(rng, b=30, k=5, steps=6):
    y = rng.random((b, k)) < 0.3
    y[0] = True
    return rng.integers(0, steps, (b, k)) / steps, y


def test_order_of_clips_and_monotone_rescaling_do_not_matter():
    rng = np.random.default_rng(0)
    for _ in range(12):
        s, y = random_case(rng)
        p = rng.permutation(len(s))
        t = y.argmax(1)
        for f, truth in ((mean_average_precision, y), (clipwise_map, y), (accuracy, t), (mrr, y), (recall_at_k, y)):
            keep = y.any(1) if f in (mrr, recall_at_k, clipwise_map) else np.ones(len(s), bool)
            want = f(s[keep], truth[keep])
            assert f(s[p][keep[p]], truth[p][keep[p]]) == pytest.approx(want, abs=1e-12)
            assert f(np.exp(3 * s[keep]), truth[keep]) == pytest.approx(want, abs=1e-12)


def test_a_tie_never_helps():
    "Rounding scores can make ties; breaking them in favour of the truth can only raise what ties count against."
    rng = np.random.default_rng(1)
    for _ in range(100):
        s, y = random_case(rng, 12, 6, 3)
        y[np.arange(12), rng.integers(0, 6, 12)] = True
        t = y.argmax(1)
        kind = s + 1e-6 * y
        one = np.eye(6)[t]
        assert accuracy(s, t) <= accuracy(s + 1e-6 * one, t)
        for f in (mrr, recall_at_k, average_precision_at_k):
            args = () if f is mrr else (2,)
            assert f(s, y, *args) <= f(kind, y, *args) + 1e-12
            assert f(s, y, *args) == pytest.approx(f(s - 1e-6 * y, y, *args), abs=1e-12)  # = the worst order


def test_constant_scores_get_no_more_than_chance():
    rng = np.random.default_rng(2)
    s, y = random_case(rng, 40, 7)
    s = 0 * s
    assert mean_average_precision(s, y) == pytest.approx(y.mean(0).mean())
    assert accuracy(s, y.argmax(1)) == 0
    rel = np.eye(40, dtype=bool)
    assert recall_at_k(np.ones((40, 40)), rel, 39) == 0 and average_precision_at_k(np.ones((40, 40)), rel) == 0


def test_tensors_of_any_float_type():
    s, y = random_case(np.random.default_rng(3), steps=4)  # quarters are exact in bfloat16
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert mean_average_precision(torch.tensor(s).to(dtype), torch.tensor(y)) == mean_average_precision(s, y)


def test_bootstrap_of_a_mean_agrees_with_theory():
    v = np.random.default_rng(4).random(400)
    lo, hi = bootstrap_ci(np.mean, v, n_boot=4000)
    half = 1.96 * v.std() / 20
    assert lo == pytest.approx(v.mean() - half, abs=0.1 * half) and hi == pytest.approx(v.mean() + half, abs=0.1 * half)


def test_groups_of_equal_rows_are_one_clip_each():
    v = np.random.default_rng(5).random(60)
    alone = pytest.approx(bootstrap_ci(np.mean, v), abs=1e-12)
    for names in (np.arange(60), [f'clip{i:03d}' for i in range(60)]):
        assert bootstrap_ci(np.mean, np.repeat(v, 5), groups=np.repeat(names, 5)) == alone


def test_resampled_map_skips_classes_that_a_resample_lost():
    s, y = random_case(np.random.default_rng(6), 20, 4)
    y[:, 2] = False
    y[3, 2] = True
    counts = resample_counts(20, 50)
    draws = [np.repeat(np.arange(20), c) for c in counts.T]
    want = [mean_average_precision(s[i], y[i]) for i in draws]
    assert (counts[3] == 0).any()
    assert resampled_map(s, y, counts) == pytest.approx(want, abs=1e-12)


def test_paired_difference_is_narrower_than_independent_ones():
    rng = np.random.default_rng(7)
    a = rng.random(300)
    b = a - 0.02 + 0.01 * rng.normal(size=300)
    d = paired_bootstrap(np.mean, a, b)
    assert 0 < d['lo'] < d['difference'] < d['hi'] and d['share_above'] == 1
    assert d['hi'] - d['lo'] < 0.1 * np.ptp(bootstrap_ci(np.mean, a))


@pytest.mark.data('audiocaps')
def test_audiocaps_protocol(data):
    caps = pd.read_csv(data)
    clip, ids = pd.factorize(caps.youtube_id)
    assert (len(caps), len(ids)) == (4875, 975) and set(np.bincount(clip)) == {5}
    rel = relevance(clip, np.arange(975))
    assert (rel.sum(1) == 1).all() and (rel.sum(0) == 5).all()
    perfect = np.eye(975)[clip] @ np.eye(975)  # identity embeddings
    for sim, r in ((perfect, rel), (perfect.T, rel.T)):
        assert recall_at_k(sim, r, 1) == mrr(sim, r) == 1 and average_precision_at_k(sim, r) == pytest.approx(1)
        assert recall_at_k(0 * sim, r, 10) == average_precision_at_k(0 * sim, r) == 0
    noise = np.random.default_rng(0).normal(size=perfect.shape)
    assert recall_at_k(noise, rel, 10) == pytest.approx(10 / 975, abs=0.01)
    assert recall_at_k(noise.T, rel.T, 10) == pytest.approx(50 / 4875, abs=0.02)
    # T→A: 1/rank inside the first ten, else 0
    rank = first_rank(noise, rel)
    assert query_ap(noise, rel) == pytest.approx(np.where(rank <= 10, 1 / rank, 0), abs=1e-12)
