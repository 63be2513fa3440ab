"""What a cluster does to a training: processes killed at any moment, SIGTERM, failing ranks, unreadable files,
full disks. Real processes, two ranks, recorded sound in shards.

COLLAT_KILLS=20 pytest tests/test_faults.py     the number of kills of the acceptance
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file

from collat.checkpoints import read_checkpoint, read_log
from collat.config import load_profile, read_results, write_results
from collat.launch import guard, launch
from collat.streaming import shard

ROOT = Path(__file__).parent.parent
COLLAT = str(Path(sys.executable).with_name('collat'))
KILLS = int(os.environ.get('COLLAT_KILLS', 3))


def usual():
    "The environment without pytest's mark: under pytest, kernels do not record what child processes print."
    return {k: v for k, v in os.environ.items() if k != 'PYTEST_CURRENT_TEST'}


def stage(profile, run, *more):
    "The command that runs the stage of the training."
    return [COLLAT, 'run', '--profile', str(profile), '--run-dir', str(run), '--stages', 'training', *more]


def finished(args, **how):
    return subprocess.run(args, cwd=ROOT, env=usual(), capture_output=True, text=True, **how)


def started(args):
    return subprocess.Popen(args, cwd=ROOT, env=usual(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def processes():
    "Processes that a test starts; what a failed test leaves is killed."
    started = []
    yield started
    for p in started:
        left = psutil.Process(p.pid).children(recursive=True) if p.poll() is None else []
        p.kill()
        for c in left:
            with suppress(psutil.Error):
                c.kill()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A profile file: two ranks on shards of forty short sounds, one of them silence at the end of its file."
    d = tmp_path_factory.mktemp('faults')
    rng = np.random.default_rng(0)
    rows = ['path,labels']
    for i in range(40):
        x = np.sin(np.arange(8_000) * 0.05 * (1 + i % 4)) if i % 2 else rng.normal(size=8_000)
        sf.write(d / f'{i}.wav', 0.2 * x, 16_000)
        rows.append(f'{i}.wav,{("noise", "tone")[i % 2]};{("low", "high")[i % 4 // 2]}')
    (d / 'my.csv').write_text('\n'.join(rows) + '\n')
    shard(str(d / 'my.csv'), d / 'shards', per_shard=4, workers=1)
    data = dict(base='smoke_clip', shards=str(d / 'shards'), shuffle_window=3, clip_seconds=0.5, n_valid=4)
    training = dict(ears='tuned', pretrain_steps=0, steps=20 + 30 * KILLS, batch=10, eval_every=16, checkpoint_every=3)
    machine = dict(workers=1, gpus=2, precision='fp32')
    (d / 'tiny.json').write_text(json.dumps(data | training | machine))
    return d / 'tiny.json'


def start(profile, run):
    cmd = [sys.executable, '-m', 'collat.launch', '--profile', str(profile), '--run_dir', str(run)]
    return subprocess.Popen(cmd, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def weights(run):
    return load_file(run / 'checkpoints/model/model.safetensors')


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def results(run, name='training'):
    return read_results(run / f'results/{name}.json')['results']


def steps_logged(run):
    log = run / 'logs/train.csv'
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def last_logged(run):
    "When the log was written to; 0: not yet."
    log = run / 'logs/train.csv'
    return log.stat().st_mtime_ns if log.exists() else 0


def wait_for(condition, process, seconds=600):
    end = time.time() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.time() < end, 'waited too long'
        time.sleep(0.01)
    return True


def group(process):
    "Ranks and data workers of a training, without torchrun itself."

    def works(p):
        try:
            line = ' '.join(p.cmdline())
        except psutil.Error:
            return False
        return 'collat.launch' in line and 'torch.distributed.run' not in line

    try:
        return [p for p in psutil.Process(process.pid).children(recursive=True) if works(p)]
    except psutil.Error:
        return []


def kill_something(process, rng) -> bool:
    "kill -9 of everything, or of one rank or data worker. False: it had ended by itself."
    victims = group(process)
    if rng.random() < 0.4 or not victims:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(victims, 20)  # ranks die with torchrun
        return True
    try:
        rng.choice(victims).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


@pytest.fixture(scope='module')
def whole(tiny):
    "The run that nothing happened to."
    run = tiny.parent / 'whole'
    assert start(tiny, run).wait(600) == 0
    return run


def test_training_from_shards_gives_a_model_and_its_record(whole, tiny):
    p = load_profile(tiny)
    last = results(whole)['valid'][-1]
    assert read_log(whole)['step'].tolist() == list(range(p.steps))
    assert last['step'] == p.steps and last['clips'] == 4
    assert results(whole)['left_out'] == dict(clips=0, reasons={})


def test_killed_at_random_moments(tiny, whole, tmp_path, processes):
    """kill -9 of a rank, a data worker or everything: bitwise the weights of the uninterrupted run.
    No file is unreadable at any time."""
    rng = random.Random(0)
    run = tmp_path / 'run'
    kills = 0
    process = None
    while not (run / 'checkpoints/model/model.safetensors').exists():
        if process is None or process.poll() is not None:
            process = start(tiny, run)
            processes.append(process)
        was = last_logged(run)
        if kills == KILLS:
            process.wait(600)
            continue
        if not wait_for(lambda: last_logged(run) > was, process):
            continue
        time.sleep(rng.uniform(0, 1.0))
        if process.poll() is not None or not kill_something(process, rng):
            continue
        kills += 1
        for f in (run / 'checkpoints/work').glob('[!.]*.pt'):
            assert zipfile.ZipFile(f).testzip() is None
    process.wait(60)
    assert kills == KILLS, f'the training was over after {kills} kills: more steps are needed'
    assert equal(weights(run), weights(whole))
    assert read_log(run)['step'].tolist() == read_log(whole)['step'].tolist()
    assert results(run)['valid'] == results(whole)['valid']


def left(run_dir):
    def mine(p):
        try:
            return p.environ().get('COLLAT_RUN') == str(run_dir)
        except (psutil.Error, OSError):
            return False

    return [p for p in psutil.process_iter() if mine(p)]


def test_sigterm_to_the_pipeline_saves_and_asks_for_another_turn(tiny, whole, tmp_path, processes):
    run = tmp_path / 'run'
    write_results(run / 'results/shards.json', {}, load_profile(tiny), time.time())  # what stage 06 writes
    args = stage(tiny, run, 'checkpoint_every=1000')
    first = started(args)
    processes.append(first)
    assert wait_for(lambda: steps_logged(run) > 4, first), first.stderr.read()
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=600)[1]
    assert first.returncode == 75 and 'stopped by SIGTERM in 12_training' in said.splitlines()[-1], said
    assert left(run) == [] and not (run / 'checkpoints/model').exists()
    assert read_checkpoint(run / 'checkpoints/work/train.pt')['data']['step'] == steps_logged(run)  # not a step is lost
    again = finished(args)
    assert again.returncode == 0, again.stderr
    assert 'resumed at step' in (run / 'notebooks/12_training.ipynb').read_text()
    assert equal(weights(run), weights(whole))


def test_full_disk_and_unreadable_checkpoint_through_the_pipeline(tiny, whole, tmp_path, processes):
    """No room for a checkpoint: the stage says so and ends. With room again: on, until a SIGTERM.
    The newest checkpoint is damaged then: the one before is taken. The weights are those of the uninterrupted run."""
    import resource

    run = tmp_path / 'run'
    work = run / 'checkpoints/work/train.pt'
    room = 2 * (whole / 'checkpoints/model/model.safetensors').stat().st_size
    write_results(run / 'results/shards.json', {}, load_profile(tiny), time.time())
    args = stage(tiny, run)
    full = finished(args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert full.returncode == 1, full.stderr
    assert 'make room and start the same command again' in full.stderr.splitlines()[-1], full.stderr
    assert left(run) == [] and not list(work.parent.glob('*.pt'))
    second = started(args)
    processes.append(second)
    assert wait_for(lambda: steps_logged(run) > 7, second), second.stderr.read()
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=600)
    assert second.returncode == 75
    reached = read_checkpoint(work)['data']['step']
    work.write_bytes(work.read_bytes()[:-1000])
    again = finished(args)
    assert again.returncode == 0, again.stderr
    shown = (run / 'notebooks/12_training.ipynb').read_text()
    assert 'cannot be read' in shown and 0 < reached - int(re.search(r'resumed at step (\d+)', shown)[1]) <= 3
    assert equal(weights(run), weights(whole))


def test_other_number_of_ranks_goes_on_in_mid_epoch(tiny, whole, tmp_path, processes):
    """Two ranks until the SIGTERM, then one: the same clips in the same steps.
    So they have the same loss and gradient up to rounding."""
    state = dict(step=5, consumed=0)
    while not state['consumed']:  # again, where the SIGTERM fell between two epochs
        process = start(tiny, tmp_path)
        processes.append(process)
        assert wait_for(lambda: steps_logged(tmp_path) > state['step'], process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 75
        state = read_checkpoint(tmp_path / 'checkpoints/work/train.pt')['data']
    launch(load_profile(tiny, dict(gpus=1, workers=0)), tmp_path)
    numbers = lambda run: read_log(run).loc[: state['step'] + 1, ['loss', 'grad_norm']].to_numpy()
    a = numbers(tmp_path)
    b = numbers(whole)
    assert len(a) == state['step'] + 2 and np.allclose(a, b, rtol=1e-3)
    assert len(read_log(tmp_path)) == len(read_log(whole))


def test_traceback_of_the_failing_rank_is_what_is_shown(tiny, tmp_path):
    write_results(tmp_path / 'results/shards.json', {}, load_profile(tiny), time.time())
    done = finished(stage(tiny, tmp_path, 'lr=1e30', 'warmup=1'))
    assert done.returncode == 1, done.stderr
    said = r'the training failed: rank \d: FloatingPointError: .* loss nan'
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    shown = (tmp_path / 'notebooks/12_training.ipynb').read_text()
    for part in ('Traceback (most recent call last)', 'the last good checkpoint is kept', 'in after_batch'):
        assert part in shown
    assert left(tmp_path) == []


SLOW = """
import os, sys, time, traceback
from pathlib import Path
from collat import launch
said = traceback.format_exc
def slow(): time.sleep(3); return said()
def fail(*_, **__): raise ValueError('no such sound')
traceback.format_exc, os.environ['RANK'] = slow, '1'
launch.as_rank(launch.load_profile('smoke'), sys.argv[1], work=fail)
"""


def test_a_traceback_is_whole_however_long_it_takes(tmp_path, capfd):
    """The group is ended as soon as a traceback is seen; that must not cut it off.
    Nor may a SIGTERM beside it, and the first one stays."""
    failure = tmp_path / 'logs/failure.txt'
    failure.parent.mkdir()
    cmd = [sys.executable, '-c', SLOW, str(tmp_path), '--standalone']
    with pytest.raises(RuntimeError, match='^the training failed: rank 1: ValueError: no such sound$'):
        guard(cmd, failure)
    assert failure.read_text().rstrip().endswith('ValueError: no such sound')
    assert list(failure.parent.iterdir()) == [failure]
    failure.unlink()
    rank = subprocess.Popen(cmd, stderr=subprocess.PIPE, text=True)
    assert any('ValueError' in line for line in rank.stderr)  # printed first, then written
    time.sleep(0.5)
    rank.terminate()
    assert rank.wait(60) == 1 and 'no such sound' in failure.read_text()
    failure.write_text('of the first')
    assert subprocess.run(cmd, stderr=subprocess.DEVNULL).returncode == 1
    assert failure.read_text() == 'of the first' and list(failure.parent.iterdir()) == [failure]


def test_a_broken_shard_is_counted_and_listed(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny.parent / 'shards', tmp_path / 'shards')
    (tmp_path / 'shards/000003.tar').unlink()
    steps = dict(steps=8, eval_every=8, pretrain_steps=4, pretrain_batch=10)
    launch(load_profile(tiny, dict(steps, gpus=1, shards=str(tmp_path / 'shards'))), tmp_path / 'run')
    for act in 'pretrain', 'training':
        out = results(tmp_path / 'run', act)['left_out']
        assert out['clips'] == 4 == len(out['reasons'])
        assert all('000003.tar' in why for why in out['reasons'].values())


FULL = """
import resource, signal, sys, torch
from collat.config import load_profile
from collat.checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def save(n):
    m = torch.nn.Linear(n, n)
    save_checkpoint(sys.argv[1], m, torch.optim.AdamW(m.parameters()), dict(step=n), load_profile('smoke'), [])
save(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(1000)
"""


def test_full_disk(tmp_path):
    done = subprocess.run([sys.executable, '-c', FULL, tmp_path / 'train.pt'], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'could not be written' in done.stderr
    assert 'The last good checkpoint is kept; make room' in done.stderr
    assert read_checkpoint(tmp_path / 'train.pt')['data'] == dict(step=2)
    assert [f.name for f in tmp_path.iterdir()] == ['train.pt']


@pytest.fixture
def script(tmp_path):
    "What would be submitted for four machines of eight GPUs."
    asked = 'run --profile paper --launcher slurm --print --nodes 4 --gpus 8 steps=10'.split()
    cmd = [COLLAT, *asked, '--run-dir', str(tmp_path / 'a run')]
    done = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / 'a run').exists()
    return done.stdout


def bash(script, *args, **env):
    return subprocess.run(['bash', *args], input=script, text=True, capture_output=True, env=os.environ | env)


def test_submission_script(script):
    assert bash(script, '-n').stderr == ''
    for part in (
        '#SBATCH --nodes=4',
        '#SBATCH --output=collat-%j.log',
        '#SBATCH --gpus-per-node=8',
        '#SBATCH --requeue',
        'step srun',
        '-m collat.launch',
        '--meet "$head:29500"',
        '-eq 75',
        'scontrol requeue',
        'steps=10',
        "/a run'",
    ):
        assert part in script, part


def test_submitted_job_asks_for_another_turn(script, tmp_path):
    "Slurm played by three small scripts: one step that wants another turn, then all of them, then one that fails."
    scripts = dict(
        scontrol='[ $1 = requeue ] && echo requeued $2 || echo node1',
        srun=f'shift; echo srun "$@"; exit $(cat {tmp_path}/code)',
        collat='echo collat "$@"',
    )
    for name, does in scripts.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{does}\n')
        (tmp_path / name).chmod(0o755)
    slurm = dict(SLURM_JOB_ID='7', SLURM_NNODES='4', SLURM_JOB_NODELIST='node[1-4]')

    def play(code):
        (tmp_path / 'code').write_text(str(code))
        return bash(script.replace(COLLAT, 'collat'), PATH=f'{tmp_path}:{os.environ["PATH"]}', **slurm)

    asked = play(75)
    assert asked.returncode == 75 and asked.stdout.splitlines()[-1] == 'requeued 7'
    through = play(0)
    assert through.returncode == 0 and 'node1:29500' in through.stdout
    assert [l.split()[0] for l in through.stdout.splitlines()] == ['collat', 'collat', 'srun', 'collat']
    failed = play(1)
    assert failed.returncode == 1 and 'requeued' not in failed.stdout
