"The README shows what lies in figures/esc50, and the protocols hold on the recordings themselves."

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from collat.cached_tokens import CachedTokens, cache_tokens
from collat.config import load_profile, read_results
from collat.esc50 import new_class_trial, readme_table, trial_clips
from collat.model import CoLLAT
from collat.recorded_scenes import readme_recorded
from collat.recordings import Recording, WholeClips, esc50_clips

ROOT = Path(__file__).parent.parent


def test_the_readme_has_the_numbers_of_the_results_file():
    shown = re.search(r'<!-- esc50:begin -->\n(.*)\n<!-- esc50:end -->', (ROOT / 'README.md').read_text(), re.S)[1]
    assert shown == readme_table(read_results(ROOT / 'figures/esc50/esc50.json')['results'])


def test_the_readme_has_the_main_table_of_its_file():
    shown = re.search(r'<!-- recorded:begin -->\n(.*)\n<!-- recorded:end -->', (ROOT / 'README.md').read_text(), re.S)[
        1
    ]
    assert shown == readme_recorded(read_results(ROOT / 'figures/esc50_long/recorded_scenes.json')['results'])


@pytest.mark.data('esc50')
def test_nobody_is_trained_and_asked(data):
    esc50_clips.cache_clear()
    clips = esc50_clips('')
    assert len(clips) == 2_000
    for draw in range(5):
        for choices in (False, True):
            trial = new_class_trial(draw, choices=choices)
            rows = trial_clips(trial, clips)
            asked = {clips[i].path for k in ('seen', 'new') for i in rows[k]}
            assert asked.isdisjoint(clips[i].path for i in rows['train'])
            assert {clips[i].label for i in rows['train']}.isdisjoint(trial.classes()[1])


def test_an_unreadable_clip_is_left_out_and_named(tmp_path):
    for k in range(3):
        sf.write(tmp_path / f'{k}.wav', np.random.default_rng(k).normal(size=16_000) * 0.1, 16_000)
    (tmp_path / '1.wav').write_text('no sound')
    p = load_profile('smoke', dict(ears='frozen', cache_clips=3))
    clips = [Recording(tmp_path / f'{k}.wav', 'dog', 1, '') for k in range(3)]
    tokens = CachedTokens(cache_tokens(CoLLAT(p), WholeClips(clips, p), tmp_path / 'tokens'))
    assert tokens.rows == [0, 2]
    assert '1.wav' in tokens.left_out[1]
