"""Files that a stranger made on purpose: none of them runs code, writes outside its folder, or takes the machine's
memory; each is refused with its name."""

import dataclasses
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers

from collat import audio
from collat.audio import AudioError, load_audio, load_sounds
from collat.audio_encoder import from_original_ast
from collat.captioning import load_captioner
from collat.checkpoints import read_checkpoint
from collat.config import load_profile
from collat.downloads import unpack
from collat.evaluate import load_any
from collat.model import CoLLAT
from collat.streaming import INDEX, Plan, Shards
from collat.text_families import load_text_encoder
from collat.weights import read_pickled, read_tensors, read_torchscript, text_weights

# ---- archives


def as_tar(path, name='x.txt', kind=tarfile.REGTYPE, link='', data=b'x'):
    with tarfile.open(path, 'w:gz') as t:
        m = tarfile.TarInfo(name)
        m.type, m.linkname, m.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
        t.addfile(m, io.BytesIO(data))


def as_zip(path, name='x.txt', mode=0o100644, data=b'x'):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        i = zipfile.ZipInfo(name)
        i.external_attr = mode << 16
        i.compress_type = zipfile.ZIP_DEFLATED
        z.writestr(i, data)


def declared(path, size):
    "A tar of one header that promises `size` bytes."
    m = tarfile.TarInfo('big.wav')
    m.size = size
    path.write_bytes(m.tobuf() + bytes(512))


def long_header(path):
    "A tar whose member has a name of two megabytes."
    with tarfile.open(path, 'w:gz', format=tarfile.PAX_FORMAT) as t:
        t.addfile(tarfile.TarInfo('x' * 2_000_000), io.BytesIO())


def encrypted(path):
    as_zip(path)
    path.write_bytes(
        path.read_bytes()
        .replace(b'PK\x03\x04\x14\0\0', b'PK\x03\x04\x14\0\1')
        .replace(b'PK\x01\x02\x14\x03\x14\0\0', b'PK\x01\x02\x14\x03\x14\0\1')
    )


OUTSIDE = 'outside the folder'
ARCHIVES = {
    **{
        f'tar {n}': (lambda p, n=n: as_tar(p, n), OUTSIDE)
        for n in ('../x', '/tmp/collat-x', 'a/../../x', 'a\\..\\..\\x')
    },
    **{
        f'zip {n}': (lambda p, n=n: as_zip(p, n), OUTSIDE)
        for n in ('../x', '/tmp/collat-x', 'a/../../x', 'a\\..\\..\\x')
    },
    'tar symbolic link': (lambda p: as_tar(p, kind=tarfile.SYMTYPE, link='/etc/passwd'), 'is a link'),
    'tar link inside': (lambda p: as_tar(p, kind=tarfile.SYMTYPE, link='y.txt'), 'is a link'),
    'tar hard link': (lambda p: as_tar(p, kind=tarfile.LNKTYPE, link='/etc/passwd'), 'is a link'),
    'tar device': (lambda p: as_tar(p, kind=tarfile.CHRTYPE), 'is a link'),
    'zip symbolic link': (lambda p: as_zip(p, mode=0o120777, data=b'/etc/passwd'), 'is a link'),
    'tar bomb': (lambda p: as_tar(p, data=bytes(12 * 10**6)), '200 times the size'),
    'zip bomb': (lambda p: as_zip(p, data=bytes(12 * 10**6)), '200 times the size'),
    'tar of a terabyte': (lambda p: declared(p, 10**12), '200 times the size'),
    'tar long name': (long_header, 'a header of 2,000,0.. bytes'),
    'encrypted zip': (encrypted, 'cannot be unpacked'),
}


@pytest.mark.parametrize('kind', ARCHIVES)
def test_archives_stay_inside_and_small(tmp_path, kind):
    make, why = ARCHIVES[kind]
    out = tmp_path / 'deep/out'
    path = tmp_path / ('a.zip' if 'zip' in kind else 'a.tar.gz')
    make(path)
    with pytest.raises(ValueError, match=why) as e:
        unpack(path, out, progress=False)
    assert path.name in str(e.value)
    left = [f for f in tmp_path.rglob('*') if f != path and (f.is_symlink() or f.is_file() and f.stat().st_size)]
    assert not left, left


# ---- pickles


class Evil:
    "Writes a file when it is unpickled."

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


def in_place_of_weights(d, data):
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'm')
    (d / 'm/model.safetensors').write_bytes(data)
    return d / 'm'


def small_bert(d, marker):
    "A folder of transformers whose weights are a pickle."
    c = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    c.save_pretrained(d)
    (d / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\nd\n')
    torch.save(dict(x=Evil(marker)), d / 'pytorch_model.bin')
    return d


def script(d, marker):
    "A TorchScript archive whose pickle calls something else than the makers of tensors."
    path = d / 's.pt'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a/constants.pkl', b'')
        z.writestr('a/data.pkl', pickle.dumps(Evil(marker)))
    return path


def objects(d, marker):
    np.save(d / 'index.npy', np.array([Evil(marker)], object), allow_pickle=True)
    (d / 'plan.json').write_text(json.dumps(dataclasses.asdict(Plan('a', 1, 'x'))))
    (d / 'classes.json').write_text('["a"]')
    return d


PICKLES = {
    'model': lambda d, raw, saved: CoLLAT.from_pretrained(in_place_of_weights(d, raw.read_bytes())),
    'model, by torch': lambda d, raw, saved: load_any(in_place_of_weights(d, saved.read_bytes())),
    'captioner': lambda d, raw, saved: load_captioner(raw),
    'tensors': lambda d, raw, saved: read_tensors(saved),
    'raw': lambda d, raw, saved: read_pickled(raw),
    'checkpoint': lambda d, raw, saved: read_pickled(saved),
    'AST': lambda d, raw, saved: from_original_ast(saved),
    'CLIP': lambda d, raw, saved: text_weights(saved),
    'text tower': lambda d, raw, saved: load_text_encoder(f'open_clip:tiny/{saved}', quick_gelu=True),
    'TorchScript': lambda d, raw, saved: read_torchscript(script(d, d / 'marker')),
    'text tower of TorchScript': lambda d, raw, saved: load_text_encoder(
        f'open_clip:tiny-quickgelu/{script(d, d / "marker")}'
    ),
    'BERT': lambda d, raw, saved: load_text_encoder(f'bert:{small_bert(d, d / "marker")}'),
    'training': lambda d, raw, saved: read_checkpoint(saved),
    'index of shards': lambda d, raw, saved: Shards(objects(d, d / 'marker')),
}


@pytest.mark.parametrize('kind', PICKLES)
def test_no_pickle_is_executed(tmp_path, kind):
    raw, saved = tmp_path / 'raw.pt', tmp_path / 'saved.pt'
    raw.write_bytes(pickle.dumps(Evil(tmp_path / 'marker')))
    torch.save(dict(weights=Evil(tmp_path / 'marker')), saved)
    with pytest.raises((ValueError, OSError)) as e:
        PICKLES[kind](tmp_path, raw, saved)
    assert not (tmp_path / 'marker').exists() and str(tmp_path) in str(e.value)
    pickle.loads(raw.read_bytes()).close()
    assert (tmp_path / 'marker').exists()  # the file is as hostile as it says


# ---- configurations

ABSURD = {
    **{
        f'{k}={v:g}': {k: v}
        for k in ('n_mels', 'd_audio', 'depth_audio', 'n_tokens', 'depth_interaction')
        for v in (1e9, -5)
    },
    **{f'{k}={v:g}': {k: v} for k in ('sample_rate', 'clip_seconds', 'frame_ms', 'hop_ms') for v in (1e12, -1, 1e-9)},
    'code for a number': dict(n_mels='__import__("os").system("touch marker")'),
    'code for a word': dict(backbone='__import__("os")'),
    'a list': dict(backbone=['ast']),
    'an object': dict(n_mels=dict(py='object')),
    'nothing': dict(d_audio=None),
    'a class': dict(_target_='os.system'),
    'a norm of zero': dict(norm_std=1e-40),
    'a norm beyond': dict(norm_mean=1e38),
    'another file as encoder': dict(text_encoder='open_clip:tiny//etc/passwd'),
    'a folder above': dict(text_encoder='bert:../../..'),
    'deep': '{"a":' * 50_000,
    'deep lists': '[' * 50_000,
    'many digits': '{"seed": ' + '9' * 10_000 + '}',
    'no object': '"smoke"',
}


@pytest.mark.parametrize('kind', ABSURD)
def test_absurd_configurations_are_refused_before_a_model_is_built(tmp_path, monkeypatch, kind):
    values = dataclasses.asdict(load_profile('smoke'))
    odd = ABSURD[kind]
    (tmp_path / 'config.json').write_text(odd if isinstance(odd, str) else json.dumps(values | odd))
    (tmp_path / 'model.safetensors').write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as e:
        CoLLAT.from_pretrained(tmp_path)
    assert len(str(e.value)) < 2_000 and not (tmp_path / 'marker').exists()
    if 'text_encoder' not in str(odd):
        assert 'config.json' in str(e.value)


# ---- sound


def wav(x, rate=16_000, channels=1, size=None) -> bytes:
    data = (np.asarray(x) * 32767).astype('<i2').tobytes()
    size = len(data) if size is None else size
    form = struct.pack('<HHIIHH', 1, channels, rate, min(rate * 2 * channels, 2**32 - 1), 2 * channels % 65536, 16)
    head = b'RIFF' + struct.pack('<I', min(2**32 - 1, 36 + size)) + b'WAVEfmt ' + struct.pack('<I', 16) + form
    return head + b'data' + struct.pack('<I', size) + data


NOISE = np.random.default_rng(0).uniform(-0.1, 0.1, 8_000)
HEADERS = {
    '1 Hz': (wav(NOISE, 1), '1 samples a second'),
    '999 Hz': (wav(NOISE, 999), '999 samples a second'),
    '4 GHz': (wav(NOISE, 2**32 - 1), 'not readable|samples a second'),
    '2 GHz': (wav(NOISE, 2**31 - 1), 'samples a second'),
    '65,535 channels': (wav(NOISE, channels=65_535), 'not readable'),
    'no channels': (wav(NOISE, channels=0), 'not readable'),
    'no samples': (wav([]), 'no samples'),
}


@pytest.mark.parametrize('kind', HEADERS)
def test_absurd_headers(tmp_path, kind):
    data, why = HEADERS[kind]
    (tmp_path / 'x.wav').write_bytes(data)
    with pytest.raises(AudioError, match=why):
        load_audio(tmp_path / 'x.wav')


@pytest.mark.parametrize('size', [2**32 - 1, 2**31, 100 * 3600 * 32_000 % 2**32])
def test_a_header_that_promises_hours_gives_what_is_there(size):
    right = load_sounds(wav(NOISE))[0]
    assert torch.equal(load_sounds(wav(NOISE, size=size))[0], right)


@pytest.mark.parametrize('kind', ['FLAC', 'WAV', 'array'])
def test_hours_of_sound_are_bounded(tmp_path, monkeypatch, kind):
    "A file of little size that unpacks to more than the memory holds."
    monkeypatch.setattr(audio, 'LONGEST', 30 / 3600)
    f = tmp_path / f'x.{kind.lower()}'
    seconds = {}
    for n in (29, 31):
        x = np.zeros(n * 8_000, np.float32)
        if kind != 'array':
            sf.write(f, x, 8_000, format=kind)
        seconds[n] = (x, 8_000) if kind == 'array' else f.read_bytes()
    assert len(load_sounds(seconds[29])[0]) == 29 * 16_000
    if kind != 'array':
        assert len(load_audio(f, max_seconds=2.0)) == 32_000
        monkeypatch.setattr(audio, '_file_blocks', lambda *_: pytest.fail('decoded, though the header says it'))
    with pytest.raises(AudioError, match='more than 0.00833.* hours of sound.*segment_time'):
        load_sounds(seconds[31])


def test_samples_of_1e25_anywhere(tmp_path):
    x = NOISE.astype(np.float32).copy()
    x[7_000] = 1e25
    sf.write(tmp_path / 'x.wav', x, 16_000, subtype='FLOAT')
    with pytest.raises(AudioError, match=r'x.wav: sample of 1e\+25 at 0.4'):
        load_audio(tmp_path / 'x.wav')


# ---- shards


def test_an_index_of_more_clips_than_there_are_bytes(tmp_path):
    head = dict(descr=np.lib.format.dtype_to_descr(INDEX), fortran_order=False, shape=(10**15,))
    objects(tmp_path, tmp_path / 'marker')
    with (tmp_path / 'index.npy').open('wb') as f:
        np.lib.format.write_array_header_1_0(f, head)
    with pytest.raises(ValueError, match='index.npy: cut off'):
        Shards(tmp_path)
