"The whole sequence for a profile that reads its training sound from shards, on a table of forty short recordings."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers

from collat import architecture as A
from collat import baselines as B
from collat.config import load_profile, read_results
from collat.ears import make_audio_encoder
from collat.pipeline import open_run, plan
from collat.stages import stages_for
from collat.streaming import shard

ROOT = Path(__file__).parent.parent
RATE = 16_000
TINY = dict(
    base='smoke',
    text_encoder='open_clip:tiny',
    pad_id=0,
    n_tokens=20,
    ears='tuned',
    cache_clips=0,
    phrases=3,
    phrases_eval=3,
    n_train=64,
    n_valid=32,  # some of them hold three events
    n_test=16,
    pretrain_steps=0,
    scratch_steps=2,
    pretrain_batch=8,
    steps=3,
    batch=8,
    baseline_steps=3,
    encoder_steps=3,
    probe_scenes=24,
    compare_scenes=24,
    probe_steps=4,
    image_steps=4,
    caption_scenes=24,
    caption_steps=8,
    reader_steps=4,
    diffusion_captions=8,
    grounding_scenes=8,
    words_scenes=8,
    compose_cases=6,
    n_boot=10,
)


def sound(kind, n, rng):
    "A bell, rain, an engine or knocks: n samples."
    t = np.arange(n) / RATE
    noise = rng.normal(size=n)
    bell, engine = np.sin(6.28 * 700 * t), np.sin(6.28 * 90 * t) * np.sin(6.28 * 7 * t)
    return 0.2 * dict(Bell=bell, Rain=noise, Engine=engine, Knock=noise * np.exp(-8 * (t % 0.25)))[kind]


def write_table(folder):
    "A table of forty clips of half a second to a second; every fifth has a second label."
    rng, rows = np.random.default_rng(0), ['path,labels,fold']
    for i in range(40):
        kind = ('Bell', 'Rain', 'Engine', 'Knock')[i % 4]
        sf.write(folder / f'{i}.wav', sound(kind, 9_000 + 170 * i, rng), RATE)
        rows.append(f'{i}.wav,{kind}{";Street" if i % 5 == 0 else ""},{1 + i % 2}')
    (folder / 'my.csv').write_text('\n'.join(rows) + '\n')
    return folder / 'my.csv'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The run folder, and the profile file that filled it."
    d = tmp_path_factory.mktemp('sharded')
    (d / 'none').mkdir()
    (d / 'tiny.json').write_text(json.dumps(TINY | dict(data=str(write_table(d)), data_root=str(d / 'none'))))
    collat = str(Path(sys.executable).with_name('collat'))
    call = [collat, 'run', '--profile', str(d / 'tiny.json'), '--run-dir', str(d / 'run')]
    done = subprocess.run(call, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr.splitlines()[-1]
    return d / 'run', d / 'tiny.json'


@pytest.mark.slow
def test_every_stage_has_written_what_it_promises(run):
    folder, profile = run
    stages = [s for s in stages_for(load_profile(profile)) if not s.extra]
    assert len(stages) == 17
    lost = [f'{s.notebook}: {g}' for s in stages for g in s.outputs if not any(folder.glob(g))]
    assert not lost
    page = (folder / 'report.md').read_text()
    assert '**Trained on recordings**: `my`' in page and 'scenes rendered from a General MIDI soundfont' in page
    tables = (
        'Table 1',
        'Table 2',
        'Table 3a',
        'Table 3b',
        'Table 4',
        'Fig. 1b, text axis',
        'Fig. 2b',
        'Fig. 4b',
        'Figure 5',
    )
    assert all(f'({t})' in page for t in tables)
    assert page.index('## Recorded sound') < page.index('## Zero-shot (Table 2)')
    assert 'its lists are not in ESC-50' in page and 'Stages that have not run' not in page
    assert str(folder.parent) not in page


@pytest.mark.slow
def test_whatever_is_trained_reads_the_shards(run):
    folder, _ = run
    rows = read_results(folder / 'results/baselines.json')['results']['rows']
    assert len({r['act2_data_order'] for r in rows if r['act2_data_order']}) == 1
    assert {r['name'] for r in rows if r['act1_steps']} >= {'clap', 'supervise', 'collat-equal'}
    assert all(set(r['valid'][-1]) == {'step', 'top1', 'map', 'clips'} for r in rows)
    heard = ['Bell', 'Engine', 'Knock', 'Rain', 'Street']
    assert B.load_baseline(folder / 'checkpoints/baselines/supervise').classes == heard
    variants = [json.loads(f.read_text()) for f in folder.glob('a*/**/checkpoints/model/config.json')]
    assert len(variants) > 8 and {v['shards'] for v in variants} == {str(folder / 'data/shards')}


@pytest.mark.slow
def test_other_scenes_do_not_train_the_model_again(run):
    folder, profile = run
    assert not any(plan(open_run(profile, run_dir=folder)).values())
    why = plan(open_run(profile, dict(eval_world='esc50'), folder))
    assert [n for n, w in why.items() if not w] == ['05_datasets', '06_streaming', '12_training', '28_public_sets']


@pytest.fixture
def published(tmp_path):
    "A profile whose AST begins with published weights (random ones), and a run folder with the shards it trains on."
    shape = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    front = dict(num_mel_bins=64, max_length=98, frequency_stride=16, time_stride=16)
    torch.manual_seed(0)
    ast = transformers.ASTForAudioClassification(transformers.ASTConfig(**shape, **front, num_labels=5))
    ast.save_pretrained(tmp_path / 'ast')
    table = str(write_table(tmp_path))
    shard(table, tmp_path / 'run/data/shards', per_shard=5, workers=1)
    start = dict(audio_weights=f'hf:{tmp_path}/ast', stem='patch', lr_audio=0.0, scratch_steps=1)
    short = dict(steps=1, baseline_steps=1, encoder_steps=1, n_valid=4, sweeps='')
    profile = {k: v for k, v in TINY.items() if k != 'base'} | start | short | dict(data=table)
    return load_profile('smoke', profile), tmp_path / 'run'


def act_one(folder):
    "Steps of the first act of a trained method; a CoLLAT's config is its profile."
    config = json.loads((folder / 'config.json').read_text())
    return config.get('profile', config)['pretrain_steps']


def test_whoever_has_no_published_weights_gets_an_act_one(published, monkeypatch):
    p, run = published
    theirs = B.load_published(make_audio_encoder(p), p).state_dict()
    supervise, clap = (B.train_baseline(n, p, run) for n in ('supervise', 'clap'))
    assert (act_one(supervise), act_one(clap)) == (0, 1)
    ours = B.load_baseline(supervise).audio.net.state_dict()
    assert all(torch.equal(ours[k].cpu(), w) for k, w in theirs.items() if not k.startswith('head.'))
    row = lambda profile, group, name, folder, *_, **more: dict(name=name, acts=act_one(folder))
    monkeypatch.setattr(A, 'model_row', row)
    monkeypatch.setattr(A, 'compared', lambda rows, n_boot: rows)
    encoders = {r['name']: r['acts'] for r in A.encoder_rows(p, run, 1, 1)}
    assert [n for n, acts in encoders.items() if not acts] == ['AST, pretrained', 'AST, from scratch']
    assert {r['acts'] for r in A.size_rows(p, run, 1, 1)} == {1}
