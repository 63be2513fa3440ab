"Whatever may be downloaded says its name, size, destination and the way by hand; offline it fails at once with the same; what was read is recorded."

import hashlib
import time
import types

import pytest
import torch
from huggingface_hub import constants

from collat import audio_encoder as A
from collat import text_encoder as T
from collat import weights as W
from collat.model import CoLLAT

AST_REPO, CLIP_REPO, DEIT_REPO = (
    'MIT/ast-finetuned-audioset-10-10-0.4593',
    'timm/vit_large_patch14_clip_224.openai',
    'timm/deit_base_distilled_patch16_384.fb_in1k',
)
WAYS = {
    'open_clip name and tag': (
        lambda: T.load_text_encoder('open_clip:ViT-L-14/openai'),
        CLIP_REPO,
        '1,710 MB',
        "open_clip:ViT-L-14/PATH', with quick_gelu=True",
    ),
    'text hub id': (
        lambda: T.load_text_encoder('hf_clip:openai/clip-vit-large-patch14'),
        'openai/clip-vit-large-patch14',
        '1,710 MB',
        'hf_clip:FOLDER',
    ),
    'audio hub id': (lambda: A.load_pretrained(A.AST(), f'hf:{AST_REPO}'), AST_REPO, '346 MB', 'hf:FOLDER'),
    'timm name': (
        lambda: A.load_pretrained(A.AST(), 'deit:deit_base_distilled_patch16_384'),
        DEIT_REPO,
        '351 MB',
        'that folder of the cache',
    ),
    'trained model': (
        lambda: CoLLAT.from_pretrained('nobody/collat-mini'),
        'nobody/collat-mini',
        'its size is shown',
        "from_pretrained('FOLDER')",
    ),
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
    for part in (
        f'cannot download {repo} from https://huggingface.co/{repo}',
        size,
        at(tmp_path, repo),
        'By hand',
        hand,
    ):
        assert part in str(e.value)


@pytest.mark.parametrize('way', WAYS)
def test_a_download_says_what_where_and_how_large(way, tmp_path, monkeypatch, capsys):
    f, repo, _, hand = WAYS[way]
    files = [
        types.SimpleNamespace(rfilename=n, size=s)
        for n, s in (
            ('config.json', 500_000),
            ('model.safetensors', 3_000_000),
            ('open_clip_model.safetensors', 3_000_000),
            ('tf_model.h5', 10**9),
        )
    ]
    monkeypatch.setattr('huggingface_hub.HfApi.model_info', lambda *a, **k: types.SimpleNamespace(siblings=files))

    def snapshot(repo, **k):
        raise OSError('the end of this test' if not k.get('local_files_only') else 'not in the cache')

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
    with pytest.raises(ConnectionError, match='the end of this test'):
        f()
    said = capsys.readouterr().out
    for part in (
        f'downloading {repo} from https://huggingface.co/{repo} to {at(tmp_path, repo)}',
        ' MB, ',
        'model.safetensors',
        'By hand',
        hand,
    ):
        assert part in said
    assert 'tf_model.h5' not in said and int(said.split(' MB, ')[0].split()[-1]) < 8


def test_open_clip_tag_with_a_plain_url(tmp_path, monkeypatch):
    "From the cache where it lies there, also offline; otherwise name, destination and the way by hand."
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(
        ConnectionError,
        match=r'cannot download m/t from https://example.org/w.pt: .*\.cache/clip/w.pt.*By hand.*open_clip:m/PATH',
    ):
        W._tag_file('m', 't', dict(url='https://example.org/w.pt'))
    to = tmp_path / '.cache/clip/w.pt'
    to.parent.mkdir(parents=True)
    to.write_bytes(b'x')
    assert str(W._tag_file('m', 't', dict(url='https://example.org/w.pt'))) == str(to)


def test_files_that_were_read_are_known_by_content(tmp_path):
    te = T.load_text_encoder('minilm')
    [(name, digest)] = W.checksums(te.files).items()
    assert name == 'model.safetensors' and digest == hashlib.sha256(te.files[0].read_bytes()).hexdigest()
    assert W.checksums(T.load_text_encoder('open_clip:tiny').files) == {}  # random weights come from no file
    torch.save(T.load_text_encoder('open_clip:tiny').locked.state_dict(), tmp_path / 'w.pt')
    assert W.checksums(T.load_text_encoder(f'open_clip:tiny/{tmp_path / "w.pt"}', quick_gelu=False).files) == {
        'w.pt': hashlib.sha256((tmp_path / 'w.pt').read_bytes()).hexdigest()
    }
    import transformers

    transformers.ASTModel(
        transformers.ASTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            num_mel_bins=64,
            max_length=298,
        )
    ).save_pretrained(tmp_path / 'ast')
    ast = A.load_pretrained(A.AST(64, 298, 32, 1, 4), f'hf:{tmp_path / "ast"}')
    assert (
        W.checksums(ast.files)
        == {'model.safetensors': hashlib.sha256((tmp_path / 'ast/model.safetensors').read_bytes()).hexdigest()}
        and not A.AST(64, 298, 32, 1, 4).files
    )
