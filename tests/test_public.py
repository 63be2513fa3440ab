"Recorded sound from end to end: a profile without act one, training from shards, and a miniature FSD50K."

import json
import subprocess
import sys
from pathlib import Path

from collat.config import read_results
from collat.pipeline import open_run, run_pipeline

ROOT = Path(__file__).parent.parent
SMALL = [str(Path(sys.executable).with_name('collat')), 'run', '--profile', 'small']
TINY = dict(base='smoke', ears='tuned', pretrain_steps=0, steps=4, eval_every=2, batch=8)


def test_a_profile_without_act_one_passes_through_the_pipeline(tmp_path):
    (tmp_path / 'tiny.json').write_text(json.dumps(TINY))
    run = open_run(tmp_path / 'tiny.json', run_dir=tmp_path / 'run')
    assert run_pipeline(run, ['scenes', 'training', 'zero_shot']) == ['04_scenes', '12_training', '20_zero_shot']
    assert not (tmp_path / 'run/checkpoints/pretrain.safetensors').exists()
    assert read_results(tmp_path / 'run/results/training.json')['results']['valid'][-1]['step'] == 4
    assert run_pipeline(run, ['scenes', 'training', 'zero_shot']) == []


def test_small_on_a_miniature_fsd50k(tmp_path):
    "The profile `small`, shrunk, from the archive's layout to the public sets. (All stages: test_sharded_sequence.)"
    from test_datasets import esc50, fsd50k, tut2017, urbansound8k

    run, data = tmp_path / 'run', tmp_path / 'data'
    heard = lambda i: ['Bark'] if i % 2 else ['Rain', 'Water']
    dev = [(i, heard(i), 'val' if i % 6 == 0 else 'train') for i in range(1_000, 1_030)]
    fsd50k(data, ['Bark', 'Rain', 'Water'], dev, [(2_000 + i, heard(i)) for i in range(6)])
    esc50(data)
    urbansound8k(data, [1_003, 3_000, 3_001, 3_002])
    tut2017(data)
    shrunk = dict(
        data_root=data,
        text_encoder='open_clip:tiny-quickgelu',
        audio_weights='',
        n_tokens=20,
        clip_seconds=0.3,
        n_mels=64,
        d_audio=32,
        depth_audio=1,
        heads_audio=2,
        depth_interaction=1,
        width_interaction=32,
        heads_interaction=2,
        steps=4,
        batch=6,
        warmup=1,
        eval_every=2,
        checkpoint_every=2,
        workers=1,
        freq_mask=4,
        time_mask=4,
    )
    stages = 'datasets,streaming,training,public_sets'
    call = [*SMALL, '--run-dir', str(run), '--stages', stages, *(f'{k}={v}' for k, v in shrunk.items())]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    made = read_results(run / 'results/shards.json')['results']
    leaks = made['made']['train']['leakage']['by_list']
    assert leaks == {'fsd50k eval': 0, 'esc50 all': 0, 'urbansound8k all': 1}
    assert made['parts']['train']['clips'] == 24 and made['parts']['valid']['clips'] == 5
    assert [v['step'] for v in read_results(run / 'results/training.json')['results']['valid']] == [2, 4]
    out = read_results(run / 'results/public_sets.json')['results']
    assert {(r['task'], r['data'], r['metric'], r['n']) for r in out['rows']} >= {
        ('zero_shot', 'fsd50k', 'mAP', 6),
        ('zero_shot', 'esc50', 'top-1', 10),
    }
    sets = {r['data'] for r in out['rows'] if r['task'] == 'zero_shot'}
    assert sets == {'esc50', 'urbansound8k', 'tut2017', 'fsd50k'}
    assert 'nothing to do' in subprocess.run(call, cwd=ROOT, capture_output=True, text=True).stdout


def test_small_without_its_data_says_where_to_get_it(tmp_path):
    call = [*SMALL, '--run-dir', str(tmp_path / 'run'), '--stages', 'streaming', f'data_root={tmp_path}']
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and '`collat data get fsd50k`' in done.stderr.splitlines()[-1], done.stderr
