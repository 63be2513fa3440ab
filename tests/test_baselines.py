"The baselines: one interface, tuned towers that move beside locked ones that do not, the same clips for all."

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from collat import baselines as B
from collat.backbones import BACKBONES
from collat.batches import StepLoader
from collat.config import load_profile
from collat.model import CoLLAT
from collat.published import open_published
from collat.text_families import load_text_encoder

Q = load_profile(
    'smoke', dict(text_encoder='open_clip:tiny', pad_id=0, pretrain_steps=2, steps=2, batch=6, pretrain_batch=6)
)
METHODS = [*B.VARIANTS, *((n, None) for n in B.CONTROLS)]
SAID = ['a dog barks', 'rain on a roof', 'a dog barks']


class Tones:
    "Stands in for `Scenes`: one or two sines per clip, their classes as labels."

    def __init__(self, root, split, profile, n=None, purpose=None):
        self.split, self.profile, self.classes = split, profile, B.split_classes(split, profile)
        self.n = 24 if split == 'train' else 8

    def __len__(self):
        return self.n

    def labels(self, i):
        return [self.classes[(i + j) % len(self.classes)] for j in range(1 + i % 2)]

    def __getitem__(self, i):
        t = torch.arange(int(self.profile.clip_seconds * self.profile.sample_rate)) / self.profile.sample_rate
        return 0.1 * sum(
            torch.sin(6.28 * (200 + 150 * self.classes.index(c)) * t) for c in self.labels(i)
        ), self.labels(i)


@pytest.fixture
def tones(monkeypatch):
    monkeypatch.setattr(B, 'Scenes', Tones)


def sounds(seed=0):
    return [
        torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1 for n in (32_000, 32_000, 21_000, 75_000)
    ]


@pytest.mark.parametrize('name, tuned', METHODS)
def test_interface(name, tuned):
    m, wavs = B.Baseline(Q, B.baseline_spec(name, tuned)), sounds()
    z = m.encode_audio(wavs)
    assert torch.allclose(z.norm(dim=1), torch.ones(4), atol=1e-5) and m.training
    assert (m.encode_audio(wavs[::-1], batch_size=1).flip(0) - z).abs().max() < 1e-5
    audio, states = m.token_features(wavs), m.token_features(wavs, 'states')
    assert audio[0].shape[1] == m.audio.d and [h.shape[1] for h in states] == [z.shape[1]] * 4 and len(states[3]) > 1
    assert torch.allclose(states[0][0], z[0], atol=1e-5)
    if m.spec.text == 'none':
        assert m.encode_text is None and m.classify(wavs, m.classes[:3]).shape == (4, 3)
        with pytest.raises(ValueError, match='no zero-shot'):
            m.classify(wavs, ['an unheard thing'])
    else:
        assert m.encode_text(SAID).shape == (3, z.shape[1]) and m.classify(wavs, ['rain', 'dog']).shape == (4, 2)
        assert (m.encode_text(SAID, batch_size=1) - m.encode_text(SAID)).abs().max() < 1e-5


def batch(m):
    s = Tones(None, 'train', Q)
    return StepLoader(s, 6, 2, 2, 0, None if m.spec.text == 'none' else lambda l: (' '.join(l), l)).load(0)[0]


@pytest.mark.parametrize('name, tuned', METHODS)
def test_a_step_moves_what_it_should(name, tuned):
    m = B.Baseline(Q, B.baseline_spec(name, tuned)).train()
    before = {n: w.detach().clone() for n, w in m.named_parameters()}
    locked = None if m.spec.text == 'none' else m.text.fingerprint()
    opt = torch.optim.SGD([w for w in m.parameters() if w.requires_grad], lr=0.1)
    m(batch(m))['loss'].backward()
    opt.step()
    moved = {n.split('.')[0] for n, w in m.named_parameters() if not torch.equal(w, before[n])}
    want = (
        {'audio', 'head'}
        | ({'logit_scale'} if locked else set())
        | ({'tower'} if m.spec.text == 'tuned' else set())
        | ({'text_head'} if m.spec.project_text else set())
    )
    assert moved == want
    if locked:
        assert m.text.fingerprint() == locked and not any(n.startswith('text.') for n in m.state_dict())
        if m.spec.text == 'locked' and not m.spec.project_text:
            assert torch.equal(
                m.encode_text(SAID),
                F.normalize(load_text_encoder('open_clip:tiny', pad_id=0).encode_text(SAID), dim=-1),
            )


def test_penalty_is_the_formula():
    m = B.Baseline(Q, B.BASELINES['cons_clap']).train()
    out = m(batch(m))
    assert out['pull'] == 0 and torch.equal(out['loss'].detach(), out['contrastive'])
    w0 = {n: w.clone() for n, w in m.text.locked.named_parameters()}
    with torch.no_grad():
        for w in m.tower.parameters():
            w.add_(0.01 * torch.randn_like(w))
    pull = 0.5 * m.spec.pull * m.tower.squared_distance()
    pull.backward()
    literal = (
        sum(((w.detach() - w0[n]).double() ** 2).sum() for n, w in m.tower.tower.named_parameters()) * m.spec.pull / 2
    )
    assert pull.item() == pytest.approx(literal.item(), rel=1e-4)
    for n, w in m.tower.tower.named_parameters():
        assert torch.allclose(w.grad, m.spec.pull * (w.detach() - w0[n]), atol=1e-7)


def test_training_saves_resumes_and_hears_the_same_clips(tones, tmp_path):
    folders = [
        B.train_baseline(n, Q, tmp_path, text_tuned=t) for n, t in (('yamnet', None), ('clap', None), ('clap', False))
    ]
    assert [f.name for f in folders] == ['yamnet', 'clap', 'clap-frozen']
    rows = [B.budget_row(f) for f in folders]
    order = B.data_order(StepLoader(Tones(None, 'train', Q), 6, 2, 2, Q.seed))
    assert {r['act1_data_order'] for r in rows} == {r['act2_data_order'] for r in rows} == {order}
    assert {r['clips'] for r in rows} == {24} and [r['tuned_text_parameters'] > 0 for r in rows] == [False, True, False]
    assert rows[1]['valid'][-1]['step'] == 2 and 'unseen_top1' in rows[1] and 'unseen_top1' not in rows[0]
    assert not list((tmp_path / 'checkpoints/work').rglob('*.pt'))
    stamp = (folders[1] / 'model.safetensors').stat().st_mtime_ns
    assert (
        B.train_baseline('clap', Q, tmp_path) == folders[1]
        and (folders[1] / 'model.safetensors').stat().st_mtime_ns == stamp
    )
    with pytest.raises(ValueError, match='steps=2'):
        B.train_baseline('clap', Q, tmp_path, steps=1)
    tuned, frozen = map(B.load_baseline, folders[1:])
    assert tuned.tower.squared_distance() > 0 and frozen.tower is None
    weights = load_file(folders[1] / 'model.safetensors')
    assert all(torch.equal(weights[n], w) for n, w in tuned.tower.state_dict(prefix='tower.').items())


def test_short_schedule_shortens_both_acts():
    p = B.baseline_profile(
        load_profile('mini', dict(steps=400, pretrain_steps=1000, warmup=30)), B.BASELINES['audioclip'], 40, seed=3
    )
    assert (p.steps, p.pretrain_steps, p.warmup, p.seed, p.template) == (40, 100, 6, 3, 'concat')
    assert (
        B.baseline_profile(load_profile('mini'), B.BASELINES['clap']).pretrain_steps
        == load_profile('mini').pretrain_steps
    )


def test_backbones_of_mini_are_as_large_as_its_ast():
    size = lambda n: sum(w.numel() for w in B.make_backbone(n, load_profile('mini')).parameters())
    assert all(0.8 < size(n) / size('ast') < 2.2 for n in BACKBONES[1:])
    with pytest.raises(ValueError, match="'resnet'"):
        B.make_backbone('resnet9', Q)


def test_kept_batches_change_nothing():
    s = Tones(None, 'train', Q)
    a, b = StepLoader(s, 6, 2, 2, 0), B.SpecLoader(s, 6, 2, 2, 0)
    b.kept = B.Kept()
    for _ in range(2):
        (x, _), (y, _) = a.load(1), b.load(1)
        assert torch.equal(B.front_end(x['wav'], Q), y['spec']) and (x['seeds'], x['labels']) == (
            y['seeds'],
            y['labels'],
        )
    assert len(b.kept.rows) == 1


def test_load_baseline_loads_collat_and_says_what_is_missing(tmp_path):
    CoLLAT(Q)._save_pretrained(tmp_path / 'm')
    assert isinstance(B.load_baseline(tmp_path / 'm'), CoLLAT)
    with pytest.raises(FileNotFoundError, match='config.json'):
        B.load_baseline(tmp_path)


class Ears(nn.Module):
    "Stands in for MS-CLAP's audio encoder: mean and length of what it is given."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.stack([x.mean(1), torch.full((len(x),), x.shape[1] / 1e5)], 1) * self.w, None


def test_msclap_adapter_repeats_and_cuts(monkeypatch):
    net = nn.Module()
    net.audio_encoder = Ears()
    make = lambda **k: types.SimpleNamespace(
        clap=net,
        args=types.SimpleNamespace(sampling_rate=1_000, duration=2),
        get_text_embeddings=lambda t: torch.ones(len(t), 2),
    )
    monkeypatch.setitem(sys.modules, 'msclap', types.SimpleNamespace(CLAP=make))
    m = open_published('msclap')
    ramp = torch.linspace(0, 0.04, 5_000)
    cut = [
        F.normalize(torch.tensor([ramp[i : i + 2_000].mean(), 0.02]), dim=0) for i in (0, 1_000, 2_000, 3_000)
    ]  # windows of 2 s, half overlap
    want = torch.stack(
        [F.normalize(torch.tensor([0.02, 0.02]), dim=0), F.normalize(sum(cut), dim=0)]
    )  # the short one is repeated
    assert torch.allclose(m.encode_audio([torch.full((500,), 0.02), ramp]), want, atol=1e-5)
    assert len(m.token_features([torch.zeros(5_000)], 'states')[0]) == 4 and not m.train().training


def test_published_says_what_is_missing(tmp_path):
    for name, say in (('msclap', 'pip install msclap'), ('wav2clip', 'ResNet_CX.ckpt')):
        with pytest.raises(ImportError, match=say):
            open_published(name)
    with pytest.raises(ValueError, match="'laion_clap'"):
        open_published('laion-clap')
    with pytest.raises(FileNotFoundError, match='615 MB'):
        open_published('laion_clap', tmp_path)
