"Audio tokens that are made once: a clip that cannot be read, a process that is killed, a training on what was kept."

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file

from collat import cached_tokens
from collat.batches import StepLoader
from collat.cached_tokens import CachedTokens, cache_tokens
from collat.checkpoints import read_log
from collat.config import load_profile, read_results
from collat.launch import launch
from collat.model import CoLLAT
from collat.scenes import Scenes
from collat.streaming import Shards, shard, shard_path
from collat.training import pretrain, train

FIELDS = dict(ears='frozen', cache_clips=90, pretrain_steps=2, n_valid=16, precision='fp32')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Rendered sound, and ears that had two steps to learn it."
    run = tmp_path_factory.mktemp('cached')
    p = load_profile('smoke', FIELDS | dict(steps=6, eval_every=4, checkpoint_every=2))
    pretrain(p, run)
    return p, run


def test_a_clip_that_cannot_be_read_is_left_out_and_listed(tmp_path):
    rng = np.random.default_rng(0)
    rows = ['path,labels']
    for i in range(10):
        sf.write(tmp_path / f'{i}.wav', 0.1 * rng.normal(size=8_000), 16_000)
        rows.append(f'{i}.wav,hiss')
    (tmp_path / 'my.csv').write_text('\n'.join(rows) + '\n')
    shard(str(tmp_path / 'my.csv'), tmp_path / 'shards', per_shard=5, workers=1)
    tar = shard_path(tmp_path / 'shards', 0)
    damaged = bytearray(tar.read_bytes())
    at = damaged.index(b'fLaC', len(damaged) // 2)
    damaged[at : at + 400] = bytes(400)
    tar.write_bytes(damaged)
    clips = Shards(tmp_path / 'shards', 0.5)
    p = load_profile('smoke', dict(ears='frozen', cache_clips=10, clip_seconds=0.5))
    cached = CachedTokens(cache_tokens(CoLLAT(p), clips, tmp_path / 'tokens'))
    assert len(cached) == 9 and cached.labels == [['hiss']] * 9
    ((i, why),) = cached.left_out.items()
    assert 'clip' in why and i not in cached.rows
    assert cached.views([(0, k) for k in range(9)]).isfinite().all()


def kept(data, folder):
    "The training clips through the ears, in pieces so small that a kill falls between two."
    p = load_profile('smoke', dict(ears='frozen', cache_clips=90))
    with patch.object(cached_tokens, 'PIECE', 4):
        return cached_tokens.cache_tokens(CoLLAT(p), Scenes(data, 'train', p), folder)


def test_killed_while_it_is_written(world, tmp_path):
    "kill -9 at three moments: bitwise the file of a run that nothing happened to."
    data = world[1] / 'data'
    code = 'import sys; sys.path.insert(0, sys.argv[1]); from test_cached_tokens import kept; kept(*sys.argv[2:])'

    def pieces_written():
        return sum(len(f.read_text().splitlines()) for f in (tmp_path / 'killed').glob('*.jsonl'))

    whole = kept(data, tmp_path / 'whole')
    for pieces in (2, 7, 15):
        process = subprocess.Popen([sys.executable, '-c', code, Path(__file__).parent, data, tmp_path / 'killed'])
        while process.poll() is None and pieces_written() < pieces:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not list((tmp_path / 'killed').glob('*.npy'))
    assert kept(data, tmp_path / 'killed').read_bytes() == whole.read_bytes()


def test_training_on_kept_tokens_resumes_and_leaves_the_ears_alone(world, tmp_path, monkeypatch):
    p, run = world
    ears = load_file(run / 'checkpoints/pretrain.safetensors')
    straight = train(p, tmp_path / 'a', run / 'checkpoints/pretrain.safetensors', run / 'data')
    load = StepLoader.load

    def dying(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return load(self, step)

    monkeypatch.setattr(StepLoader, 'load', dying)
    with pytest.raises(KeyboardInterrupt):
        train(p, tmp_path / 'b', run / 'checkpoints/pretrain.safetensors', run / 'data')
    monkeypatch.setattr(StepLoader, 'load', load)
    resumed = train(p, tmp_path / 'b', run / 'checkpoints/pretrain.safetensors', run / 'data')
    a, b = (load_file(f / 'model.safetensors') for f in (straight, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[f'audio.{k}'], x) for k, x in ears.items() if not k.startswith('head.'))
    assert len(list((run / 'tokens').glob('*.npy'))) == 1  # both trainings read the same file
    assert read_results(tmp_path / 'a/results/training.json')['results']['left_out'] == dict(clips=0, reasons={})


def test_two_ranks_make_and_read_the_tokens_together(world, tmp_path):
    "The first loss, before any weight has moved, is that of one process."
    p, run = world
    for name, ranks in (('one', 1), ('two', 2)):
        q = load_profile('smoke', FIELDS | dict(steps=3, gpus=ranks))
        (tmp_path / name).mkdir()
        (tmp_path / name / 'data').symlink_to(run / 'data')
        (tmp_path / name / 'checkpoints').mkdir()
        (tmp_path / name / 'checkpoints/pretrain.safetensors').symlink_to(run / 'checkpoints/pretrain.safetensors')
        launch(q, tmp_path / name)
    one, two = (read_log(tmp_path / name)['loss'] for name in ('one', 'two'))
    assert abs(one[0] - two[0]) < 1e-5 and abs(one - two).max() < 1e-2
    files = [next((tmp_path / name / 'tokens').glob('*.npy')) for name in ('one', 'two')]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_frozen_ears_that_never_learnt_are_refused(tmp_path, world):
    p, run = world
    with pytest.raises(ValueError, match='pretrain_steps above 0, or audio_weights'):
        train(p, tmp_path / 'x', None, run / 'data')
