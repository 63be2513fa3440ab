"What README says about adding something, done from outside the package."

import re

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from collat.checkpoints import read_log
from collat.config import load_profile
from collat.datasets import ADAPTERS, SOURCES, Clip, Source, data_check, load_dataset
from collat.ears import AUDIO_ENCODERS, Ears
from collat.launch import launch
from collat.model import CoLLAT
from collat.text_encoder import LockedTextEncoder
from collat.text_families import TEXT_FAMILIES, load_text_encoder

WORDS = '[pad] [start] [end] this is a sound of dog cat rain'.split()


class Tower(nn.Module):
    "Word embeddings and one layer that mixes them."

    def __init__(self, d):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), d)
        self.layers = nn.ModuleList([nn.Linear(d, d)])


class Mine(LockedTextEncoder):
    "A text family: where its parts are, and how its tokenizer is asked."

    @property
    def table(self):
        return self.locked.words.weight

    @property
    def blocks(self):
        return self.locked.layers

    def _embed(self, h, positions):
        return h

    def _block(self, block, x, bias):
        scores = x @ x.mT
        return block((scores if bias is None else scores + bias[:, 0]).softmax(-1) @ x)

    def _ids(self, texts):
        return [[WORDS.index(w) for w in t.lower().split()] for t in texts]

    def _spans(self, text):
        return text, [m.span() for m in re.finditer(r'\w+', text)]

    def _pieces(self):
        return WORDS, {1, 2}


def load_mine(which, name, pad_id=None):
    "`mine:WIDTH` (a family of this test)"
    torch.manual_seed(0)
    return Mine(Tower(int(which)), None, name, 12, pad_id or 0, [1], [2], 'none', 'random')


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(TEXT_FAMILIES, 'mine:', load_mine)
    return 'mine:16'


def test_a_text_family(mine):
    te = load_text_encoder(mine)
    texts = ['This is a sound of dog', 'rain']
    g = te.targets(texts, 8, labels=[['dog'], ['rain']])
    z, _ = te.encode_audio_tokens(g.h, presence=te.presence(g.h))
    assert F.cosine_similarity(z, te.encode_text(texts)).min() > 0.99
    assert te.nearest_tokens(g.h[1, :1]).words[0][0] == 'rain'
    before = te.fingerprint()
    assert load_text_encoder(mine).fingerprint() == before and not list(te.parameters())
    with pytest.raises(ValueError, match='no text encoder .other:1.; names are .*mine:WIDTH'):
        load_text_encoder('other:1')
    with pytest.raises(ValueError, match='mine:WIDTH'):
        load_text_encoder('mine:')


class TinyEars(nn.Module):
    "A token is a line through sixteen frames."

    files = ()

    def __init__(self, n_mels, n_classes):
        super().__init__()
        self.d = 24
        self.line = nn.Linear(16 * n_mels, self.d)
        self.head = nn.Linear(self.d, n_classes) if n_classes else None

    def forward(self, spec):
        return self.line(spec.unfold(1, 16, 16).flatten(2))

    def classify(self, spec):
        return self.head(self(spec).mean(1))


@pytest.mark.parametrize('ears', ['tuned', 'frozen'])
def test_an_audio_encoder(ears, monkeypatch, tmp_path):
    "Two steps of act one and two of act two, from its own table of ears to a saved model."
    monkeypatch.setitem(AUDIO_ENCODERS, 'mine', Ears(lambda p, n_classes=None: TinyEars(p.n_mels, n_classes)))
    p = load_profile('smoke', dict(backbone='mine', ears=ears, pretrain_steps=2, steps=2))
    model = CoLLAT.from_pretrained(launch(p, tmp_path))
    assert isinstance(model.audio, TinyEars) and read_log(tmp_path)['step'].tolist() == [0, 1]
    wavs = 0.1 * torch.randn(3, 32_000, generator=torch.Generator().manual_seed(0))
    assert model.classify(wavs, ['dog', 'rain']).shape == (3, 2)
    with pytest.raises(ValueError, match="audio_weights='hf:x' is read by ast and yamnet only"):
        CoLLAT(load_profile('smoke', dict(backbone='mine', audio_weights='hf:x')))


def list_mine(base, splits):
    "Clips of a list: file, class, split."
    rows = [line.split(',') for line in (base / 'list.txt').read_text().split()]
    clips = [Clip(f'audio/{file}', (label,), split=split) for file, label, split in rows if split in splits]
    return clips, ['dog', 'rain'], []


def test_a_data_set(monkeypatch, tmp_path):
    "A source and an adapter: found, checked and read by its name; a missing file is named."
    about = dict(url='https://example.org', size='1 MB', licence='CC0', expected=dict(train=2, test=1), classes=2)
    source = Source('mine', 'Mine', ('mine',), ('list.txt',), 'list.txt and audio/', **about)
    monkeypatch.setitem(SOURCES, 'mine', source)
    monkeypatch.setitem(ADAPTERS, 'mine', list_mine)
    folder = tmp_path / 'mine'
    (folder / 'audio').mkdir(parents=True)
    (folder / 'list.txt').write_text('a.wav,dog,train\nb.wav,rain,train\nc.wav,dog,test\n')
    for name in 'ac':
        soundfile.write(folder / f'audio/{name}.wav', np.zeros(1_600), 16_000)
    data = load_dataset('mine', tmp_path)
    assert [c.labels for c in data.clips] == [('dog',), ('dog',)] and data.classes == ['dog', 'rain']
    assert data.report.missing == ['audio/b.wav']
    assert len(load_dataset('mine', tmp_path, 'test').clips) == 1
    line = next(x for x in data_check(tmp_path).splitlines() if x.startswith('mine '))
    assert '2 of' in line and '2 classes' in line
    with pytest.raises(ValueError, match="split 'valid' is not one of train, test"):
        load_dataset('mine', tmp_path, 'valid')
