"What README says about adding something, done from outside the package."

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from collat import cli, pipeline, report, stages
from collat.checkpoints import read_log
from collat.clips import Clip
from collat.config import load_profile
from collat.datasets import data_check, load_dataset
from collat.ears import AUDIO_ENCODERS, Ears
from collat.launch import launch
from collat.lists import ADAPTERS
from collat.losses import LOSS_TERMS, CoLLATLoss, LossTerm, loss_weights
from collat.model import CoLLAT
from collat.sources import SOURCES, Source
from collat.text_encoder import LockedTextEncoder
from collat.text_families import TEXT_FAMILIES, load_text_encoder
from collat.validation import plot_curves

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

    def __init__(self, n_mels, n_classes):
        super().__init__()
        self.d = 24
        self.line = nn.Linear(16 * n_mels, self.d)
        self.head = nn.Linear(self.d, n_classes) if n_classes else None

    def forward(self, spec):
        return self.line(spec.unfold(1, 16, 16).flatten(2))

    def classify(self, spec):
        return self.head(self(spec).mean(1))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    "A folder in which the scenes of these tests are rendered once."
    return tmp_path_factory.mktemp('scenes')


@pytest.fixture
def run_dir(scenes, tmp_path):
    (tmp_path / 'run').mkdir()
    for at in (tmp_path, tmp_path / 'run'):
        (at / 'data').symlink_to(scenes)
    return tmp_path


@pytest.mark.parametrize('ears', ['tuned', 'frozen'])
def test_an_audio_encoder(ears, monkeypatch, run_dir):
    "Two steps of act one and two of act two, from its own table of ears to a saved model."
    monkeypatch.setitem(AUDIO_ENCODERS, 'mine', Ears(lambda p, n_classes=None: TinyEars(p.n_mels, n_classes)))
    p = load_profile('smoke', dict(backbone='mine', ears=ears, pretrain_steps=2, steps=2))
    model = CoLLAT.from_pretrained(launch(p, run_dir))
    assert isinstance(model.audio, TinyEars) and read_log(run_dir)['step'].tolist() == [0, 1]
    wavs = 0.1 * torch.randn(3, 32_000, generator=torch.Generator().manual_seed(0))
    assert model.classify(wavs, ['dog', 'rain']).shape == (3, 2)
    with pytest.raises(ValueError, match="audio_weights='hf:x' is read by ast, yamnet, own only"):
        CoLLAT(load_profile('smoke', dict(backbone='mine', audio_weights='hf:x')))


def alike(h_at, h_at_noisy, scale, least=0.0):
    "Root of the mean squared distance of the tokens of both views, in their unit; `least` is its own option."
    return F.mse_loss(h_at, h_at_noisy).sqrt().clamp(min=least) / scale


def test_a_loss_term(monkeypatch, run_dir):
    """One line: the log has the term and its pull, the sum has it with its weight, the curves have its title.
    It asks for the noisy view, which no other term of this profile reads."""
    monkeypatch.setitem(LOSS_TERMS, 'alike', LossTerm(alike, 5.0, title='Both views alike'))
    p = load_profile('smoke', dict(pretrain_steps=2, steps=3, lambda_uni_token=0.0))
    launch(p, run_dir)
    log = read_log(run_dir)
    assert (log['alike'] > 0).all() and (log['pull_alike'] > 0).all() and 'uni_token' not in log
    summed = sum(lam * log[k] for k, lam in loss_weights(p).items() if k in log)
    np.testing.assert_allclose(log['loss'], summed, rtol=1e-5)
    assert (5 * log['alike'] > 1e-3 * log['loss']).all()  # the sum above would be another without it
    figure, axes = plt.subplots(1, 3)
    plot_curves(log, axes)
    assert [x.get_label() for x in axes[2].lines] == [LOSS_TERMS[k].title for k in ('cross_token', 'global', 'alike')]
    plt.close(figure)


def test_a_loss_term_asks_for_what_there_is(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, 'odd', LossTerm(lambda h_at, colour: h_at.sum(), 1.0))
    with pytest.raises(ValueError, match="loss term 'odd' asks for colour; there are group, h_at"):
        CoLLAT(load_profile('smoke'))
    monkeypatch.setitem(LOSS_TERMS, 'odd', LossTerm(lambda h_at, z_a: z_a.sum(), 1.0))
    with pytest.raises(ValueError, match="loss term 'odd' needs z_a"):
        CoLLATLoss(dict(odd=1.0))(torch.zeros(1, 2, 3), None, None, None, None)


FIGURES = Path(__file__).parent.parent / 'figures/mini'
SILENCE = """import time
import torch
from pathlib import Path
from collat.config import load_profile, write_results
from collat.model import CoLLAT

started = time.time()
p = load_profile(profile, overrides)
model = CoLLAT.from_pretrained(f'{run_dir}/checkpoints/model')
z = model.encode_audio([torch.zeros(32_000)] * 2)
rows = [dict(sound='silence', norm=float(z[0].norm()), steps=p.steps)]
drawn = dict(title='Silence', text='What nothing sounds like.', rows=rows)
write_results(Path(run_dir) / 'results/silence.json', dict(report=drawn), p, started)"""


def test_an_evaluation(monkeypatch, run_dir):
    "One stage: every sequence has it before the report, papermill runs it, and its table stands on the page."
    cells = ["profile = 'mini'\nrun_dir = '.'\noverrides = {}", SILENCE]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = dict(name='python3', language='python', display_name='python3')
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, run_dir / '60_silence.ipynb')
    model = 'checkpoints/model/model.safetensors'
    stage = stages.Stage('60_silence', (model,), ('results/silence.json',), folder=str(run_dir))
    monkeypatch.setattr(stages, 'EVALUATIONS', [stage])
    for name in ('mini', 'esc50', 'small'):
        sequence = {s.notebook: s for s in stages.stages_for(load_profile(name))}
        assert 'results/silence.json' in sequence['50_report'].inputs, name

    short = dict(pretrain_steps=2, steps=2)
    launch(load_profile('smoke', short), run_dir / 'run')
    run = pipeline.open_run('smoke', short, run_dir / 'run')
    assert pipeline.run_pipeline(run, ['silence'], say=lambda s: None) == ['60_silence']
    assert pipeline.plan(run, ['silence']) == {'60_silence': []}
    for name in ('scenes', 'zero_shot', 'ablations', 'training'):  # what else the page needs is the committed run's
        shutil.copy(FIGURES / f'{name}.json', run.run_dir / 'results')
    monkeypatch.setattr(report, 'zero_distance', lambda *_: (1.0, 1.0, 1.0))  # would render the scenes of mini
    page = report.report_page(run.run_dir)
    assert '## Silence\n\nWhat nothing sounds like.\n\n| sound | norm | steps |' in page
    assert '| silence | 1.000 | 2 |' in page


def test_a_task_of_the_command_line(monkeypatch, tmp_path, capsys):
    (tmp_path / 'my_task.py').write_text('def count(checkpoint, data, *_):\n    return dict(letters=len(data))\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.TASKS, 'mine', 'my_task:count')
    with pytest.raises(SystemExit) as end:
        cli.main(['eval', '--task', 'mine', '--data', 'abc'])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out) == dict(letters=3)


def list_mine(base, splits):
    "Clips of a list: file, class, split."
    rows = [line.split(',') for line in (base / 'list.txt').read_text().split()]
    clips = [Clip(f'audio/{file}', (label,), split=split) for file, label, split in rows if split in splits]
    return clips, ['dog', 'rain'], []


def test_a_data_set(monkeypatch, tmp_path):
    "A source and an adapter: found, checked and read by its name; a missing file is named."
    about = dict(
        url='https://example.org',
        size='1 MB',
        licence='CC0',
        expected=dict(train=2, test=1),
        classes=2,
        multilabel=True,
    )
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
    assert data.report.missing == ['audio/b.wav'] and data.multilabel
    assert len(load_dataset('mine', tmp_path, 'test').clips) == 1
    line = next(x for x in data_check(tmp_path).splitlines() if x.startswith('mine '))
    assert '2 of' in line and '2 classes' in line
    with pytest.raises(ValueError, match="split 'valid' is not one of train, test"):
        load_dataset('mine', tmp_path, 'valid')
