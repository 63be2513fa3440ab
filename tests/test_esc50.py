"The protocols of ESC-50 hold on the recordings themselves."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from test_text_encoder import clip_model

from collat.audio import load_audio
from collat.cached_tokens import CachedTokens, cache_tokens
from collat.config import load_profile
from collat.esc50 import evaluate_esc50, hear_all, new_class_trial, trial_clips
from collat.model import CoLLAT
from collat.recordings import ESC50, Recording, WholeClips, esc50_clips

ROOT = Path(__file__).parent.parent


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


def small_esc50(root):
    "Two clips of a second for each class and fold, under the names and the list of ESC-50."
    base = root / 'ESC-50-master'
    (base / 'audio').mkdir(parents=True)
    (base / 'meta').mkdir()
    each = [(fold, k, take) for fold in range(1, 6) for k in range(50) for take in 'AB']
    rows = [(f'{fold}-{k}-{take}-{k}.wav', fold, k, ESC50[k], k) for fold, k, take in each]
    for i, (file, _, k, *_) in enumerate(rows):
        wav = np.sin(np.arange(16_000) * (k + 1) / 40) + 0.1 * np.random.default_rng(i).normal(size=16_000)
        sf.write(base / 'audio' / file, 0.3 * wav, 16_000)
    table = pd.DataFrame(rows, columns=['filename', 'fold', 'target', 'category', 'src_file'])
    table['category'] = table.category.str.replace(' ', '_')
    table.to_csv(base / 'meta/esc50.csv', index=False)


def published_ast(folder):
    "A small AST with random weights, as transformers itself saves it."
    transformers = pytest.importorskip('transformers')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ASTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            num_mel_bins=64,
            max_length=98,
            layer_norm_eps=1e-6,
            frequency_stride=16,
            time_stride=16,
        )
        net = transformers.ASTModel(config).eval()
    net.save_pretrained(folder)
    return net


def test_ast_of_transformers_and_clip_of_open_clip_stand_behind_the_profile(tmp_path):
    "All five protocols on a miniature, with weights that the original libraries saved."
    small_esc50(tmp_path / 'data')
    theirs = published_ast(tmp_path / 'ast')
    sizes = dict(input_resolution=torch.tensor(32), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    torch.save(clip_model(True).state_dict() | sizes, tmp_path / 'clip.pt')
    ears = dict(
        backbone='ast', audio_weights=f'hf:{tmp_path}/ast', audio_stages='', d_audio=32, depth_audio=1, heads_audio=4
    )
    front = dict(n_mels=64, stride=16, stem='patch', clip_seconds=1.0, norm_mean=-4.3, norm_std=4.6)
    text = dict(text_encoder=f'open_clip:tiny-quickgelu/{tmp_path}/clip.pt', pad_id=49407, n_tokens=20)
    quick = dict(steps=2, batch=20, warmup=1, n_boot=20, probe_steps=4, depth_interaction=1, precision='fp32')
    more = dict(data_root=str(tmp_path / 'data'))
    p = load_profile('esc50', ears | front | text | quick | more)
    esc50_clips.cache_clear()
    results = evaluate_esc50(p, tmp_path / 'run')
    assert {r['protocol'] for r in results['rows']} == set('abde')
    assert {r['features'] for r in results['ears'] if r['protocol'] == 'c'} == {
        'mean and deviation of the tokens',
        'mean embedding',
        'tokens',
    }
    assert results['clips'] == 500 and not results['left_out']
    _, tokens, model = hear_all(p, tmp_path / 'run')
    assert len(tokens) == 500
    clip = esc50_clips(p.data_root)[7]
    spec = model.spectrogram(load_audio(clip.path, 16_000)[None])
    with torch.no_grad():
        expected = theirs(spec).last_hidden_state
    assert np.abs(tokens.tokens[7, 0] - expected[0].numpy()).max() < 5e-3  # half precision
