"Our own ears: whose recordings they learn from, and `make ears` on a miniature, in two processes, stopped and resumed."

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch

from collat.attribution import LICENCES, TEST_FOLD, miniature, own_list, own_table
from collat.cli import main
from collat.config import REQUEUE, load_profile
from collat.model import CoLLAT
from collat.nothing import calibrate_folder
from collat.recordings import esc50_clips
from collat.yamnet import YAMNet, write_keras

TINY = dict(n_classes=6, phrases=30, phrases_eval=4, n_train=512, n_valid=16, n_test=16, clip_seconds=1.5, d_audio=32)
TINY |= dict(scratch_steps=30, pretrain_batch=16, warmup=5, eval_every=15, checkpoint_every=5, gpus=2, cache_clips=64)
TINY |= dict(steps=6, batch=16, depth_interaction=1, width_interaction=32, heads_interaction=2)


@pytest.mark.data('esc50')
def test_the_table_is_what_the_list_of_esc50_says(data):
    made, ours = own_list(), own_table()
    assert made.to_csv(index=False) == ours.to_csv(index=False)
    clips = {c.path.stem: c for c in esc50_clips()}
    test = {c.source for c in clips.values() if c.fold == TEST_FOLD}
    assert len(test) > 200
    for r in ours.itertuples():
        assert clips[r.stem].fold != TEST_FOLD and clips[r.stem].source not in test, r.stem
    assert set(ours.licence[ours.part == 'train']) == set(LICENCES)


@pytest.fixture(scope='module')
def profile(tmp_path_factory):
    "A file: the profile `own` at a size for tests, on noise for recordings and a teacher who knows nothing."
    d = tmp_path_factory.mktemp('own')
    root = miniature(d / 'data', lambda label, rng: rng.uniform(0.05, 0.2) * rng.standard_normal(8_000))
    (root / 'yamnet').mkdir()
    teacher = YAMNet().eval()
    torch.nn.init.constant_(teacher.head.bias, -6.0)  # hears little of its 521 names, as the published one does
    write_keras(root / 'yamnet/yamnet.h5', teacher)
    file = d / 'tiny.json'
    file.write_text(json.dumps(dict(base='own', data_root=str(root)) | TINY))
    return file


def steps_of(log):
    return [int(r['step']) for r in csv.DictReader(log.open())] if log.exists() else []


def test_two_processes_stopped_and_resumed(profile, tmp_path):
    run = tmp_path / 'run'
    cmd = [sys.executable, '-m', 'collat.own_ears', '--profile', str(profile), '--run_dir', str(run)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    first = subprocess.Popen(cmd, env=env)
    log = run / 'logs/ears.csv'
    while first.poll() is None and len(steps_of(log)) < 8:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == REQUEUE
    reached = len(steps_of(log))
    assert 8 <= reached < 30 and not (run / 'checkpoints/ears.safetensors').exists()
    again = subprocess.run(cmd, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert 'resumed at step' in again.stdout
    assert steps_of(log) == list(range(30))
    folder = run / 'own/model'
    p = load_profile('mini', json.loads((folder / 'config.json').read_text()))
    assert p.known_above > -1 and p.answer_scale > 0
    assert not (run / 'results/own_test.json').exists() and not (run / 'data/test_reads.jsonl').exists()
    assert 'Not measured' not in (folder / 'README.md').read_text()


def classify(*args):
    with pytest.raises(SystemExit) as end:
        main(['classify', *map(str, args)])
    assert not end.value.code


def test_answers_say_whether_they_know(tmp_path, capsys):
    "In JSON and in words."
    sound, folder = tmp_path / 'noise.wav', tmp_path / 'model'
    sf.write(sound, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    CoLLAT(load_profile('smoke')).save_pretrained(folder)
    for threshold, known in ((0.999, False), (-0.999, True)):
        calibrate_folder(folder, 20.0, threshold)
        classify(sound, '--model', folder, '--json')
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert answer['known'] is known and 0 <= answer['labels'][0]['score'] <= 1
        classify(sound, '--model', folder)
        assert ('nothing that I know' in capsys.readouterr().out) is not known


def test_no_fold_five_in_training(profile, monkeypatch):
    "Where the table named a clip of the test fold, or of its recordings, nothing would be read."
    import collat.attribution as attribution

    p = load_profile(profile)
    ours = own_table()
    name = next(c.path.stem for c in esc50_clips(p.data_root) if c.fold == TEST_FOLD and c.label == 'dog')
    row = ours[ours.part == 'train'].iloc[[0]].assign(stem=name)
    monkeypatch.setattr(attribution, 'own_table', lambda: pd.concat([row, ours]))
    with pytest.raises(ValueError, match='for the test alone'):
        attribution.own_recordings('train', p, ['dog'])
