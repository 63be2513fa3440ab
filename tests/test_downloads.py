"""Whatever may be downloaded says its name, size, destination and the way by hand.

Offline it fails at once with the same; what was read is recorded.
"""

import hashlib
import time
import types

import pytest
import torch
from huggingface_hub import constants

from collat import audio_encoder as A
from collat import text_families as T
from collat import weights as W
from collat.model import CoLLAT

AST_REPO = 'MIT/ast-finetuned-audioset-10-10-0.4593'
CLIP_REPO = 'timm/vit_large_patch14_clip_224.openai'
OPENAI_REPO = 'openai/clip-vit-large-patch14'
DEIT_REPO = 'timm/deit_base_distilled_patch16_384.fb_in1k'
SMALL_AST = (64, 298, 32, 1, 4)  # mel bins, frames, width, layers, heads


def open_clip_tag():
    T.load_text_encoder('open_clip:ViT-L-14/openai')


def text_hub_id():
    T.load_text_encoder(f'hf_clip:{OPENAI_REPO}')


def audio_hub_id():
    A.load_pretrained(A.AST(), f'hf:{AST_REPO}')


def timm_name():
    A.load_pretrained(A.AST(), 'deit:deit_base_distilled_patch16_384')


def trained_model():
    CoLLAT.from_pretrained('nobody/collat-mini')


WAYS = {  # what to call, repository, size, the way by hand
    'open_clip name and tag': (open_clip_tag, CLIP_REPO, '1,710 MB', "open_clip:ViT-L-14/PATH', with quick_gelu=True"),
    'text hub id': (text_hub_id, OPENAI_REPO, '1,710 MB', 'hf_clip:FOLDER'),
    'audio hub id': (audio_hub_id, AST_REPO, '346 MB', 'hf:FOLDER'),
    'timm name': (timm_name, DEIT_REPO, '351 MB', 'that folder of the cache'),
    'trained model': (trained_model, 'nobody/collat-mini', 'its size is shown', "from_pretrained('FOLDER')"),
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    for k in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
        monkeypatch.delenv(k, raising=False)


def at(tmp_path, repo):
    return str(tmp_path / 'hub' / f'models--{repo.replace("/", "--")}')


@pytest.mark.parametrize('why', ['HF_HUB_OFFLINE', 'no network'])
@pytest.mark.parametrize('way', WAYS)
def test_offline_fails_at_once(way, why, tmp_path, monkeypatch):
    f, repo, size, hand = WAYS[way]
    if why == 'no network':
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')  # nothing listens there
    else:
        monkeypatch.setenv(why, '1')
    with pytest.raises(ConnectionError):
        f()  # imports take their time once
    t = time.time()
    with pytest.raises(ConnectionError) as e:
        f()
    assert time.time() - t < 20
    message = str(e.value)
    assert f'cannot download {repo} from https://huggingface.co/{repo}' in message
    for part in (size, at(tmp_path, repo), 'By hand', hand):
        assert part in message


@pytest.mark.parametrize('way', WAYS)
def test_a_download_says_what_where_and_how_large(way, tmp_path, monkeypatch, capsys):
    f, repo, _, hand = WAYS[way]
    sizes = {
        'config.json': 500_000,
        'model.safetensors': 3_000_000,
        'open_clip_model.safetensors': 3_000_000,
        'tf_model.h5': 10**9,
    }
    files = [types.SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    monkeypatch.setattr('huggingface_hub.HfApi.model_info', lambda *a, **k: types.SimpleNamespace(siblings=files))

    def snapshot(repo, **k):
        raise OSError('the end of this test' if not k.get('local_files_only') else 'not in the cache')

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
    with pytest.raises(ConnectionError, match='the end of this test'):
        f()
    said = capsys.readouterr().out
    assert f'downloading {repo} from https://huggingface.co/{repo} to {at(tmp_path, repo)}' in said
    for part in (' MB, ', 'model.safetensors', 'By hand', hand):
        assert part in said
    assert 'tf_model.h5' not in said and int(said.split(' MB, ')[0].split()[-1]) < 8


def test_open_clip_tag_with_a_plain_url(tmp_path, monkeypatch):
    "From the cache where it lies there, also offline; otherwise name, destination and the way by hand."
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HOME', str(tmp_path))
    record = dict(url='https://example.org/w.pt')
    said = r'cannot download m/t from https://example.org/w.pt: .*\.cache/clip/w.pt.*By hand.*open_clip:m/PATH'
    with pytest.raises(ConnectionError, match=said):
        W.tag_file('m', 't', record)
    to = tmp_path / '.cache/clip/w.pt'
    to.parent.mkdir(parents=True)
    to.write_bytes(b'x')
    assert str(W.tag_file('m', 't', record)) == str(to)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_were_read_are_known_by_content(tmp_path):
    te = T.load_text_encoder('minilm')
    assert W.checksums(te.files) == {'model.safetensors': sha256(te.files[0])}
    tiny = T.load_text_encoder('open_clip:tiny')
    assert W.checksums(tiny.files) == {}  # random weights come from no file
    path = tmp_path / 'w.pt'
    torch.save(tiny.locked.state_dict(), path)
    from_file = T.load_text_encoder(f'open_clip:tiny/{path}', quick_gelu=False)
    assert W.checksums(from_file.files) == {'w.pt': sha256(path)}


def test_an_audio_encoder_is_known_by_content(tmp_path):
    import transformers

    mels, frames, width, layers, heads = SMALL_AST
    shape = dict(num_mel_bins=mels, max_length=frames, hidden_size=width, intermediate_size=4 * width)
    config = transformers.ASTConfig(num_hidden_layers=layers, num_attention_heads=heads, **shape)
    transformers.ASTModel(config).save_pretrained(tmp_path)
    assert not A.AST(*SMALL_AST).files
    ast = A.load_pretrained(A.AST(*SMALL_AST), f'hf:{tmp_path}')
    assert W.checksums(ast.files) == {'model.safetensors': sha256(tmp_path / 'model.safetensors')}
