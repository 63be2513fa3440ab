"""Contracts of the probe.

No test label is heard, the cache survives what disks do, folds and splits keep apart what must be apart."""

import json
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from collat.clips import Clip, Manifest
from collat.config import load_profile
from collat.features import as_features, extract, manifest_features, take
from collat.linear_probe import evaluate_manifest, evaluate_probe, manifest_plans
from collat.metrics import mean_average_precision
from collat.probes import fit_line, plan_folds, plan_splits, probe


class Encoder:
    "A stand-in for a supervised baseline: tokens, no text side, one vector of loudness per tenth of a second."

    profile = load_profile('smoke')
    calls = 0

    def token_features(self, wavs, kind='audio', batch_size=64):
        Encoder.calls += 1
        return [self.loudness(torch.as_tensor(w)) for w in wavs]

    def loudness(self, wav):
        parts = [c for c in wav.split(1600) if len(c) > 2]
        return torch.stack([torch.stack([c.mean(), c.std(), c.abs().max(), c.diff().std()]) for c in parts])


@pytest.fixture
def world():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=g)
    return torch.randn(200, 3, 8, generator=g) + 1.5 * torch.eye(8)[y][:, None], y


@pytest.mark.parametrize('kind,more', [('linear', {}), ('decoder', dict(steps=18))])
@pytest.mark.parametrize('multilabel', [False, True, None])
def test_test_labels_are_not_heard(world, kind, more, multilabel):
    x, y = world
    splits = np.array(['train'] * 90 + ['valid'] * 40 + ['test'] * 70)
    hot = torch.eye(4)[y]
    if multilabel is not False:
        hot[::3] = torch.maximum(hot[::3], hot[::3].roll(1, 1))
    other = hot.clone()
    other[130:] = hot[130:][torch.randperm(70, generator=torch.Generator().manual_seed(1))]
    a, b = (probe(x, h, splits=splits, kind=kind, multilabel=multilabel, n_boot=10, **more) for h in (hot, other))
    assert torch.equal(a['predictions'][130:], b['predictions'][130:]) and a['chosen'] == b['chosen']
    assert [r['value'] for r in a['rows']] != [r['value'] for r in b['rows']]


@pytest.mark.parametrize('kind,more', [('linear', {}), ('decoder', dict(steps=18))])
def test_a_fold_does_not_hear_its_own_labels(world, kind, more):
    x, y = world
    folds = np.arange(200) % 4 + 1
    run = partial(probe, x, folds=folds, kind=kind, multilabel=False, n_boot=10, **more)
    before = run(y)['predictions']
    for fold in (1, 3):
        lies = y.clone()
        mine = torch.tensor(folds == fold)
        lies[mine] = (y[mine] + 1) % 4
        assert torch.equal(run(lies)['predictions'][mine], before[mine])


def test_same_seed_same_result_and_another_seed_another(world):
    x, y = world
    splits = np.array(['train'] * 150 + ['test'] * 50)
    run = partial(probe, x, y, splits=splits, kind='decoder', multilabel=False, n_boot=10, steps=12)
    a, b, c = (run(seed=s)['predictions'][150:] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('n', [5, 10])
def test_folds_are_disjoint_and_complete(n):
    folds = np.random.default_rng(0).integers(1, n + 1, 300)
    tested = []
    for name, train, valid, test, refit in plan_folds(folds):
        assert not set(folds[train]) & set(folds[valid]) and set(folds[test]) == {name} and refit
        assert sorted([*train, *valid, *test]) == list(range(300))
        tested += [*test]
    assert sorted(tested) == list(range(300))


def test_a_cut_validation_part_comes_from_training_only():
    splits = np.array(['train'] * 20 + ['eval'] * 10)
    ((_, train, valid, test, refit),) = plan_splits(splits, seed=3)
    assert len(valid) == 4 and set(train) | set(valid) == set(range(20)) and set(test) == set(range(20, 30)) and refit
    ((_, train, valid, _, _),) = plan_splits(splits, np.array([1, 2, 3, 4] * 5 + [0] * 10))
    assert set(valid) == set(range(0, 20, 4))


def test_multilabel_number_is_scikit_learns(world):
    x, y = world
    hot = torch.eye(4)[y]
    hot[::2] = torch.maximum(hot[::2], hot[::2].roll(1, 1))
    got = probe(x, hot, splits=['train'] * 80 + ['val'] * 40 + ['eval'] * 80, multilabel=True, n_boot=10)
    (row,) = (r for r in got['rows'] if r['metric'] == 'mAP')
    want = mean_average_precision(got['predictions'][120:].numpy(), hot[120:].numpy())
    assert row['value'] == pytest.approx(want) and row['n'] == 80


def test_line_is_at_its_minimum():
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    y = torch.eye(3)[torch.arange(80) % 3]
    w = fit_line(x, y, 'softmax', 0.1).requires_grad_()
    (torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + 0.05 * w[:-1].square().sum()).backward()
    assert w.grad.abs().max() < 1e-3


@pytest.mark.parametrize('damage', ['flip', 'cut', 'no description', 'not json', 'empty'])
def test_a_damaged_part_is_made_again_and_only_that(tmp_path, damage):
    def read(ids):
        for i in ids:
            yield i, torch.randn(3200 + 1600 * i, generator=torch.Generator().manual_seed(i))

    get = partial(extract, Encoder(), read, 6, tmp_path, 'a', 'b', part=2)
    first = [get().tokens(i) for i in range(6)]  # copies: a mapped file that is cut short is a bus error
    body = next(tmp_path.glob('*/00001.npy'))
    raw = bytearray(body.read_bytes())
    if damage == 'flip':
        raw[-1] ^= 4
        body.write_bytes(raw)
    if damage == 'cut':
        body.write_bytes(raw[:-2])
    if damage == 'empty':
        body.write_bytes(b'')
    if damage == 'no description':
        body.with_suffix('.json').unlink()
    if damage == 'not json':
        body.with_suffix('.json').write_text('{')
    Encoder.calls = 0
    second = get()
    assert Encoder.calls == 1 and all(torch.equal(first[i], second.tokens(i)) for i in range(6))
    get()
    assert Encoder.calls == 1 and not list(tmp_path.glob('*/.*'))


def test_features_of_other_weights_or_data_are_not_mistaken(tmp_path):
    def read(ids):
        return ((i, torch.ones(3200)) for i in ids)

    for name, data, n in (('a', 'x', 2), ('b', 'x', 2), ('a', 'y', 2), ('a', 'x', 3)):
        extract(Encoder(), read, n, tmp_path, name, data)
    assert len(list(tmp_path.iterdir())) == 4


def tree(root: Path, n: int = 24, bad=(), **kw) -> Manifest:
    clips = []
    for i in range(n):
        f = root / f'{i}.wav'
        rate = Encoder.profile.sample_rate
        wav = np.sin(np.arange(rate) * 0.1) if i % 2 else np.random.default_rng(i).normal(size=rate) * 0.2
        sf.write(f, 0.3 * wav, rate)
        clips.append(Clip(str(f), ('tone' if i % 2 else 'noise',), **{k: v(i) for k, v in kw.items()}))
    for i in bad:
        (root / f'{i}.wav').write_bytes(b'no sound')
    return Manifest('tree', clips, ['noise', 'tone'])


def test_manifest_with_broken_clips_prints_the_n_it_has(tmp_path):
    m = tree(tmp_path, bad=(0, 7), fold=lambda i: i // 2 % 3 + 1)
    r = evaluate_manifest(Encoder(), m, tmp_path / 'features', 'x', n_boot=10, steps=12)
    assert {x['n'] for x in r['rows']} == {22} and [Path(s).name for s in r['skipped']] == ['0.wav', '7.wav']
    assert all(x['value'] > 0.9 for x in r['rows'] if x['probe'] == 'linear')
    f, y, kept, _ = manifest_features(Encoder(), m, tmp_path / 'features', 'x')
    assert [c.labels[0] for c in kept] == [m.classes[i] for i in y.argmax(1)] and len(kept) == len(f) == 22


def test_manifest_rules(tmp_path):
    def rule(**kw):
        return list(manifest_plans(tree(tmp_path, 8, **kw).clips))

    assert rule(fold=lambda i: i % 4 + 1, split=lambda i: 'all') == ['folds']  # ESC-50, UrbanSound8K
    assert rule(split=lambda i: ('train', 'val', 'eval')[i % 3]) == ['splits']  # FSD50K
    both = rule(fold=lambda i: i % 3 + 1 if i < 6 else 0, split=lambda i: 'dev' if i < 6 else 'eval')
    assert both == ['folds', 'splits']  # TUT
    with pytest.raises(ValueError, match='three folds'):
        rule(split=lambda i: 'eval')


def test_a_model_without_text_is_evaluated_on_scenes_from_the_cache_the_second_time(tmp_path):
    p = load_profile('smoke', dict(phrases=3, phrases_eval=3, n_train=24, n_valid=12, n_test=12, n_boot=10))
    r = evaluate_probe(Encoder(), p, tmp_path / 'data', tmp_path / 'features', 'x', 'test: contract', steps=12)
    wanted = set(product(['test'], ['linear', 'decoder'], ['top-1', 'mAP']))
    assert {(x['split'], x['probe'], x['metric']) for x in r['rows']} >= wanted
    assert 'other' in r['missing'] or any(x['split'] == 'other' for x in r['rows'])
    columns = 'split probe features metric value lo hi n classes folds seed protocol'
    assert set(columns.split()) <= set(r['rows'][0])
    json.dumps(r, allow_nan=False)
    again = evaluate_probe(None, p, tmp_path / 'data', tmp_path / 'features', 'x', 'test: contract', steps=12)
    assert again == r
    reads = [json.loads(l) for l in (tmp_path / 'data/test_reads.jsonl').read_text().splitlines()]
    assert {x['split'] for x in reads} <= {'test', 'other'} and all(x['purpose'] == 'test: contract' for x in reads)


def test_take_and_padding():
    f = as_features([torch.ones(2, 3), torch.zeros(5, 3), 2 * torch.ones(1, 3)])
    x, mask = take(f, [2, 1]).batch([0, 1])
    assert x.shape == (2, 5, 3) and (~mask).sum(1).tolist() == [1, 5] and x[0, 0, 0] == 2 and x[0, 1:].abs().sum() == 0


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda x, y: probe(x, y), 'neither folds nor splits'),
        (lambda x, y: probe(x, y, [1, 2] * 100), 'three or more'),
        (lambda x, y: probe(x, y, [1, 2, 3]), 'equal lengths'),
        (lambda x, y: probe(x, y, [1, 2, 3, 4] * 50, kind='svm'), "kind 'svm'"),
        (lambda x, y: probe(x, torch.eye(4)[y] * 2, [1, 2, 3, 4] * 50), '0 and 1'),
        (lambda x, y: probe(x, torch.ones(200, 2), [1, 2, 3, 4] * 50, multilabel=False), 'exactly one'),
        (lambda x, y: probe([torch.ones(2, 3), torch.ones(2, 4)], y, [1, 2]), 'one d'),
        (lambda x, y: probe(x, y, splits=['train', 'valid'] * 100), 'at least one other'),
    ],
)
def test_refused(world, call, says):
    with pytest.raises(ValueError, match=says):
        call(*world)
