"The whole sequence, shrunk to seconds, by papermill: with MiniLM, and with a randomly initialised CLIP tower."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from collat import training
from collat.checkpoints import read_log
from collat.config import AUDIOCAPS_TEST, find_data, load_profile, read_results
from collat.launch import launch
from collat.model import CoLLAT

ROOT = Path(__file__).parent.parent
COLLAT = str(Path(sys.executable).with_name('collat'))


def collat(*args):
    return subprocess.run([COLLAT, *args], capture_output=True, text=True, cwd=ROOT)


def check_zero_shot(run, profile):
    "The results of notebook 20 in a run folder: whole, and of this profile."
    zs = read_results(run / 'results/zero_shot.json')
    assert zs['profile']['name'] == profile and zs['run']['seed'] == 0 and zs['run']['versions']['torch']
    rows = [r for r in zs['results']['rows'] if r['protocol'] == 'paper']
    assert {(r['split'], r['metric'], r['noise']) for r in rows} >= {
        (s, m, n) for s in ('test', 'unseen') for m in ('top-1', 'mAP') for n in (0, 0.1, 0.01)
    }
    assert all(r['lo'] <= r['value'] <= r['hi'] and r['n'] > 1 for r in rows)
    assert len(read_results(run / 'results/training.json')['results']['valid']) == 2
    return zs


def test_every_stage_runs_and_a_second_call_does_nothing(tmp_path):
    run = tmp_path / 'smoke'
    first = collat('run', '--profile', 'smoke', '--run-dir', str(run))
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    zs = check_zero_shot(run, 'smoke')
    page = (run / 'report.md').read_text()
    assert all(
        f'({t})' in page
        for t in ('Table 1', 'Table 2', 'Table 3a', 'Table 3b', 'Table 4', 'Fig. 1b, text axis', 'Figure 5')
    )
    here = find_data(*AUDIOCAPS_TEST)
    assert ('human captions, AudioCaps, measured' in page, page.count('`collat data get audiocaps` fetches them')) == (
        (True, 0) if here else (False, 2)
    )
    reads = [json.loads(l) for l in (run / 'data/test_reads.jsonl').read_text().splitlines()]
    readers = {r['purpose'].split(':')[0] for r in reads} - {'30_ablations'}  # notebook 30 tries its seeds there
    assert readers == {
        '04_scenes',
        '20_zero_shot',
        '21_linear_probe',
        '22_retrieval',
        '23_captioning',
        '24a_image_generation',
        '25_text_retention',
        '26_grounding',
        '27_words',
    }
    assert not (ROOT / 'figures/smoke').exists(), 'only a run in runs/<profile> is published'
    second = collat('run', '--profile', 'smoke', '--run-dir', str(run))
    assert second.returncode == 0 and 'nothing to do' in second.stdout and ': runs' not in second.stdout, second.stdout
    assert read_results(run / 'results/zero_shot.json') == zs


def test_stages_that_read_the_text_tower_run_with_clip(tmp_path):
    "Causal mask, EOT, padding with EOT's id and QuickGELU: trained, classified, read as words."
    stages = 'scenes,training,zero_shot,words'
    done = collat('run', '--profile', 'smoke_clip', '--run-dir', str(tmp_path), '--stages', stages)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_zero_shot(tmp_path, 'smoke_clip')
    assert read_results(tmp_path / 'results/words.json')['profile']['text_encoder'].startswith('open_clip:')


def short_training(run):
    "The command of a training that can be killed on its way."
    schedule = 'steps=30', 'eval_every=20', 'checkpoint_every=4'
    return 'run', '--profile', 'smoke', '--run-dir', str(run), '--stages', 'scenes,training', *schedule


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run that nothing happened to."
    run = tmp_path_factory.mktemp('whole')
    done = collat(*short_training(run))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run


def wait_for_step(log, step, process, seconds=600):
    "Waits until the training log holds a step."
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if log.exists() and sum(1 for _ in log.open()) > step:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.xdist_group('whole')
def test_a_killed_run_resumes_and_ends_with_the_same_weights(whole, tmp_path):
    "kill -9 in mid-training, through the command line: bitwise the weights of an uninterrupted run."
    args = short_training(tmp_path)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.Popen([COLLAT, *args], cwd=ROOT, start_new_session=True, **quiet)
    try:
        assert wait_for_step(tmp_path / 'logs/train.csv', 9, first)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    assert not (tmp_path / 'checkpoints/model/model.safetensors').exists()
    again = collat(*args)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    a, b = (load_file(run / 'checkpoints/model/model.safetensors') for run in (whole, tmp_path))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert 'resumed at step' in json.dumps(json.loads((tmp_path / 'notebooks/12_training.ipynb').read_text()))


@pytest.mark.xdist_group('whole')
def test_a_slip_of_the_pen_costs_nothing(whole):
    "A learning rate that is none, and two at which the training fails. With the slip mended nothing is trained again."
    args = short_training(whole)
    model = whole / 'checkpoints/model/model.safetensors'
    made = model.stat().st_mtime_ns
    weights = model.read_bytes()
    for slip in 'nan', 'inf':
        refused = collat(*args, f'pretrain_lr={slip}')
        assert refused.returncode != 0 and f'pretrain_lr={slip}: a finite number is accepted' in refused.stderr
        assert model.stat().st_mtime_ns == made
    for slip in '1e30', '1e35':
        failed = collat(*args, f'pretrain_lr={slip}')
        assert failed.returncode == 1 and 'FloatingPointError' in failed.stderr, failed.stderr
        assert 'is set aside in previous/12_training/' in failed.stdout
        assert 'comes back with them' in failed.stderr.splitlines()[-1]
        assert not model.exists()
    mended = collat(*args)
    assert mended.returncode == 0 and '12_training: came back' in mended.stdout, mended.stdout
    assert ': runs' not in mended.stdout
    assert model.stat().st_mtime_ns == made and model.read_bytes() == weights


def test_two_processes_by_torchrun(tmp_path):
    "Both acts on two ranks; one model, one log, one row per step."
    p = load_profile('smoke', dict(gpus=2, steps=4, pretrain_steps=2, eval_every=4, n_valid=16))
    folder = launch(p, tmp_path)
    assert CoLLAT.from_pretrained(folder).profile.steps == 4
    assert read_log(tmp_path)['step'].tolist() == [0, 1, 2, 3]
    assert read_results(tmp_path / 'results/training.json')['results']['valid'][-1]['step'] == 4


def test_training_leaves_the_text_tower_as_it_was(tmp_path, monkeypatch):
    "To the bit, over a whole training: no checkpoint holds the tower, so this cannot be seen afterwards."
    seen, run_steps = [], training.run_steps

    def watched(model, *args, **kwargs):
        text = getattr(model, 'text', None)
        before = text and text.fingerprint()
        out = run_steps(model, *args, **kwargs)
        if text:
            seen.append((before, text.fingerprint()))
        return out

    monkeypatch.setattr(training, 'run_steps', watched)
    launch(load_profile('smoke', dict(pretrain_steps=2, steps=4, n_valid=16)), tmp_path)
    assert len(seen) == 1 and seen[0][0] == seen[0][1]

    def clumsy(model, *args, **kwargs):
        if hasattr(model, 'text'):
            next(model.text.locked.parameters()).data.add_(1e-3)
        return run_steps(model, *args, **kwargs)

    monkeypatch.setattr(training, 'run_steps', clumsy)
    with pytest.raises(RuntimeError, match='locked text encoder have changed'):
        launch(load_profile('smoke', dict(pretrain_steps=2, steps=4, n_valid=16, seed=1)), tmp_path / 'b')
