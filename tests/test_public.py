"Recorded sound from end to end: a profile without act one, training from shards, resume, ranks, and the whole sequence on a miniature FSD50K."
import json, subprocess, sys
from pathlib import Path

from collat.config import load_profile, read_results
from collat.pipeline import open_run, run_pipeline

ROOT = Path(__file__).parent.parent
TINY = dict(base='smoke', pretrain_steps=0, steps=4, eval_every=2, batch=8)


def test_a_profile_without_act_one_passes_through_the_pipeline(tmp_path):
    (tmp_path/'tiny.json').write_text(json.dumps(TINY))
    run = open_run(tmp_path/'tiny.json', run_dir=tmp_path/'run')
    assert run_pipeline(run, ['scenes', 'training', 'zero_shot']) == ['04_scenes', '12_training', '20_zero_shot']
    assert not (tmp_path/'run/checkpoints/pretrain.safetensors').exists()
    assert read_results(tmp_path/'run/results/training.json')['results']['valid'][-1]['step'] == 4
    assert run_pipeline(run, ['scenes', 'training', 'zero_shot']) == []
