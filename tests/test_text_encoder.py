"The locked encoder at true shapes and with files as the libraries save them; everything offline, weights random."

import copy
import json
import os
import pickle
import warnings

import open_clip
import pytest
import torch
from torch import nn

from collat import text_families as T
from collat import weights as W
from collat.text_encoder import LABEL, PAD, TEMPLATE
from collat.text_families import load_text_encoder

TEXTS = ['This is a sound of dog', 'This is a sound of church bells, and crackling fire', 'rain']
VISION = dict(image_size=32, layers=1, width=64, patch_size=16, head_width=16)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    torch.manual_seed(0)


def clip_model(quick_gelu, **text):
    "A whole CLIP model of open_clip, vision tower included."
    text = dict(W.TINY['text_cfg'], **text)
    return open_clip.CLIP(embed_dim=48, vision_cfg=VISION, text_cfg=text, quick_gelu=quick_gelu).eval()


def same_as(m, te):
    "How far an encoder's answer is from that of a whole CLIP model."
    with torch.no_grad():
        return diff(te.encode_text(TEXTS, n=77), m.encode_text(open_clip.tokenize(TEXTS)))


def diff(a, b):
    return (a - b).abs().max().item()


def test_vit_l_14_true_shape():
    te = load_text_encoder('open_clip:ViT-L-14', pad_id=49407, quick_gelu=True)
    assert (te.d, te.d_out, te.n_layers, te.n_ctx, te.activation) == (768, 768, 12, 77, 'quick_gelu')
    ids = open_clip.get_tokenizer('ViT-L-14')(TEXTS)
    with torch.no_grad():
        z = te.locked(ids)
    assert diff(te.encode_text(TEXTS, n=77), z) <= 1e-4  # of up to 3.4; the wrong activation gives 4e-2
    assert diff(te.encode_text(TEXTS), z) <= 1e-4
    g = te.targets(TEXTS, 75)
    z_a, x = te.encode_audio_tokens(g.h)
    assert z_a.shape == (3, 768) and x.shape == (3, 77, 768)


@pytest.mark.parametrize('save', ['state_dict', 'checkpoint', 'safetensors', 'custom_text'])
def test_open_clip_files(tmp_path, save):
    m = clip_model(True)
    f = tmp_path / ('w.safetensors' if save == 'safetensors' else 'w.pt')
    sd = m.state_dict()
    if save == 'checkpoint':
        torch.save(dict(epoch=3, name='x', state_dict={f'module.{k}': v for k, v in sd.items()}), f)
    elif save == 'safetensors':
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in sd.items()}, f)
    elif save == 'custom_text':
        from open_clip.model import convert_to_custom_text_state_dict

        torch.save(convert_to_custom_text_state_dict(sd), f)
    else:
        torch.save(sd, f)
    assert same_as(m, load_text_encoder(f'open_clip:tiny/{f}', quick_gelu=True)) <= 1e-5
    with pytest.raises(ValueError, match='say quick_gelu'):
        load_text_encoder(f'open_clip:tiny/{f}')


def openai_archive(m, f):
    "TorchScript archive with the three numbers that OpenAI's files carry, half precision where theirs have it."
    del m.context_length, m.vocab_size
    for k, v in (('input_resolution', 32), ('context_length', 77), ('vocab_size', 49408)):
        m.register_buffer(k, torch.tensor(v))
    example = dict(encode_text=torch.zeros(1, 77, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.trace_module(m, example, check_trace=False).save(str(f))


PLAIN = "was trained with 'quick_gelu', but the model would run it with 'gelu'"


def test_openai_archive_is_refused_with_plain_gelu(tmp_path):
    m = clip_model(True)
    f = tmp_path / 'ViT-tiny.pt'
    openai_archive(m, f)
    assert W.file_activation(f) == 'quick_gelu'
    for kw in ({}, dict(quick_gelu=False)):
        with pytest.raises(ValueError, match=f'ViT-tiny.pt {PLAIN}'):
            load_text_encoder(f'open_clip:tiny/{f}', **kw)
    assert same_as(m, load_text_encoder(f'open_clip:tiny-quickgelu/{f}')) <= 1e-5


def test_openai_state_dict_in_half_precision(tmp_path):
    from open_clip.model import convert_weights_to_fp16

    m = clip_model(True)
    f = tmp_path / 'w.pt'
    convert_weights_to_fp16(m)
    numbers = dict(input_resolution=32, context_length=77, vocab_size=49408)
    torch.save(m.state_dict() | {k: torch.tensor(v) for k, v in numbers.items()}, f)
    with pytest.raises(ValueError, match='quick_gelu'):
        load_text_encoder(f'open_clip:tiny/{f}')
    te = load_text_encoder(f'open_clip:tiny-quickgelu/{f}')
    assert same_as(m.float(), te) <= 1e-5
    assert te.dtype == torch.float32


def test_config_beside_the_file_tells_the_activation(tmp_path):
    f = tmp_path / 'open_clip_model.safetensors'
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in clip_model(True).state_dict().items()}, f)
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=dict(quick_gelu=True))))
    with pytest.raises(ValueError, match="trained with 'quick_gelu'"):
        load_text_encoder(f'open_clip:tiny/{f}')
    assert load_text_encoder(f'open_clip:tiny-quickgelu/{f}').activation == 'quick_gelu'


def test_tag_openai_runs_quick_gelu(tmp_path, monkeypatch):
    "open_clip 3.3.0 only warns for ViT-B-32 with the tag openai; here the tag's record decides."
    tower, _ = W.build_tower(W.tower_config('ViT-B-32'), True, seed=1)
    torch.save(tower.state_dict(), tmp_path / 'w.pt')
    monkeypatch.setattr(T, 'tag_file', lambda *a: tmp_path / 'w.pt')
    te = load_text_encoder('open_clip:ViT-B-32/openai')
    assert te.activation == 'quick_gelu' and type(te.blocks[0].mlp.gelu).__name__ == 'QuickGELU'
    assert type(load_text_encoder('open_clip:ViT-B-32/laion2b_s34b_b79k').blocks[0].mlp.gelu).__name__ == 'GELU'
    with pytest.raises(ValueError, match='openai was trained'):
        load_text_encoder('open_clip:ViT-B-32/openai', quick_gelu=False)
    with torch.no_grad():
        assert diff(te.encode_text(TEXTS, n=77), tower.eval()(open_clip.tokenize(TEXTS))) <= 1e-5


def save_hf_clip(folder, cls='CLIPTextModelWithProjection', tokenizer=None, **kw):
    import transformers as H

    tok = open_clip.SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    vocabulary = {names.get(k, k): v for k, v in tok.encoder.items()}
    H.CLIPTokenizer(vocabulary, sorted(tok.bpe_ranks, key=tok.bpe_ranks.get)).save_pretrained(tokenizer or folder)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, projection_dim=48)
    text = size | dict(bos_token_id=49406, eos_token_id=49407) | kw
    if cls == 'CLIPModel':
        vision = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        vision |= dict(image_size=32, patch_size=16)
        c = H.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    else:
        c = H.CLIPTextConfig(**text)
    m = getattr(H, cls)(c).eval()
    m.save_pretrained(folder)
    return m


@pytest.mark.parametrize('eos', [49407, 2])
def test_hf_clip_whole_model(tmp_path, eos):
    "A whole CLIPModel folder; eos_token_id 2 is what OpenAI's old configurations say."
    m = save_hf_clip(tmp_path, 'CLIPModel', eos_token_id=eos)
    te = load_text_encoder(f'hf_clip:{tmp_path}')
    i = te.tokenizer(TEXTS, padding='max_length', max_length=77, return_tensors='pt')
    with torch.no_grad():
        z = m.get_text_features(**i).pooler_output
        x = m.text_model(**i).last_hidden_state
    t = te.tokenize(TEXTS, n=77)
    assert torch.equal(t.ids, i['input_ids']) and torch.equal(t.mask, i['attention_mask'].bool())
    assert diff(te.encode_text(TEXTS, n=77), z) <= 1e-5
    assert diff(te.encode_embeddings(te.static_embeddings(t.ids))[t.mask], x[t.mask]) <= 1e-5


def test_hf_clip_of_stable_diffusion(tmp_path):
    "text_encoder/ without projection, tokenizer/ beside it: all 77 states."
    m = save_hf_clip(tmp_path / 'text_encoder', 'CLIPTextModel', tmp_path / 'tokenizer')
    te = load_text_encoder(f'hf_clip:{tmp_path}/text_encoder')
    t = te.tokenize(TEXTS, n=77)
    with torch.no_grad():
        o = m(t.ids)
    assert te.pad_id == 49407 and te.d_out == 64
    assert diff(te.encode_embeddings(te.static_embeddings(t.ids), t.mask), o.last_hidden_state) <= 1e-5
    assert diff(te.encode_text(TEXTS), o.pooler_output) <= 1e-5


def test_hf_clip_of_openai_needs_quick_gelu(tmp_path):
    save_hf_clip(tmp_path / 'clip-vit-large-patch14', hidden_act='gelu')
    with pytest.raises(ValueError, match=f'clip-vit-large-patch14 {PLAIN}'):
        load_text_encoder(f'hf_clip:{tmp_path}/clip-vit-large-patch14')
    save_hf_clip(tmp_path / 'laion', hidden_act='gelu')
    assert load_text_encoder(f'hf_clip:{tmp_path}/laion').activation == 'gelu'


def hf_names(w):
    "An open_clip text tower's weights under the names of `CLIPTextModelWithProjection`."
    top = {
        'token_embedding.weight': 'embeddings.token_embedding.weight',
        'positional_embedding': 'embeddings.position_embedding.weight',
        'ln_final.weight': 'final_layer_norm.weight',
        'ln_final.bias': 'final_layer_norm.bias',
    }
    inner = {
        'ln_1': 'layer_norm1',
        'ln_2': 'layer_norm2',
        'attn.out_proj': 'self_attn.out_proj',
        'mlp.c_fc': 'mlp.fc1',
        'mlp.c_proj': 'mlp.fc2',
    }
    out = {'text_projection.weight': w['text_projection'].T.contiguous()}
    for k, v in w.items():
        if k in top:
            out[f'text_model.{top[k]}'] = v
        if not k.startswith('transformer.resblocks.'):
            continue
        i, rest = k.removeprefix('transformer.resblocks.').split('.', 1)
        at = f'text_model.encoder.layers.{i}'
        part, kind = rest.rsplit('.', 1)
        if part == 'attn':
            kind = kind.removeprefix('in_proj_')
            out |= {f'{at}.self_attn.{x}_proj.{kind}': y for x, y in zip('qkv', v.chunk(3))}
        else:
            out[f'{at}.{inner[part]}.{kind}'] = v
    return out


def test_both_libraries_agree_on_vit_l_14(tmp_path):
    """True text size of ViT-L/14, one set of random weights under both libraries' names.
    They give equal ids, equal states of every layer, equal z_t."""
    ours = load_text_encoder('open_clip:ViT-L-14', pad_id=49407, quick_gelu=True)
    with torch.no_grad():  # larger than the initialisation, so that the activation function matters
        for k, v in ours.locked.named_parameters():
            if 'mlp' in k:
                v.mul_(3)
    size = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    m = save_hf_clip(tmp_path, **size, projection_dim=768, hidden_act='quick_gelu')
    found = m.load_state_dict(hf_names(ours.locked.state_dict()), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {'text_model.embeddings.position_ids'}
    m.save_pretrained(tmp_path)
    theirs = load_text_encoder(f'hf_clip:{tmp_path}')
    (tmp_path / 'model.safetensors').unlink()  # half a gigabyte
    a, b = (te.tokenize(TEXTS, n=77) for te in (ours, theirs))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert (theirs.d, theirs.d_out, theirs.n_layers) == (768, 768, 12)
    with torch.no_grad():
        x, y = (te.hidden_states(te.static_embeddings(a.ids), a.mask) for te in (ours, theirs))
        assert len(x) == len(y) == 13 and min(v.std() for v in x[1:]) > 0.01
        assert max(diff(u, v) for u, v in zip(x, y)) <= 1e-3
        z = ours.encode_text(TEXTS, n=77)
        assert z.abs().mean() > 0.1 and diff(z, theirs.encode_text(TEXTS, n=77)) <= 1e-3
        for block in theirs.blocks:
            block.mlp.activation_fn = nn.GELU()
        assert diff(z, theirs.encode_text(TEXTS, n=77)) > 1e-2, 'the wrong activation would not be noticed'


def in_hub_cache(repo, monkeypatch, tmp_path):
    "Folder that `huggingface_hub` takes for the cached snapshot of `repo`."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    at = tmp_path / 'hub' / f'models--{repo.replace("/", "--")}'
    (at / 'refs').mkdir(parents=True)
    (at / 'refs/main').write_text('0' * 40)
    (at / 'snapshots' / ('0' * 40)).mkdir(parents=True)
    return at / 'snapshots' / ('0' * 40)


def openai_weights(way, tmp_path, monkeypatch):
    "A small CLIP model in OpenAI's fashion, the name of its text encoder, and arguments that ask for plain GELU."
    m = clip_model(True)
    if way == 'name':
        from safetensors.torch import save_file

        d = in_hub_cache('timm/tiny.openai', monkeypatch, tmp_path)
        save_file({k: v.contiguous() for k, v in m.state_dict().items()}, d / 'open_clip_model.safetensors')
        records = dict(openai=dict(hf_hub='timm/tiny.openai/', quick_gelu=True))
        monkeypatch.setattr('open_clip.pretrained.get_pretrained_cfg', lambda model, tag: records.get(tag, {}))
        name = 'open_clip:tiny/openai'
        wrong = dict(name=name, quick_gelu=False)
    elif way == 'hub id':
        d = in_hub_cache('openai/clip-vit-base-patch32', monkeypatch, tmp_path)
        hf = save_hf_clip(d, intermediate_size=256, hidden_act='quick_gelu')
        hf.load_state_dict(hf_names(m.state_dict()), strict=False)
        hf.save_pretrained(d)
        name = 'hf_clip:openai/clip-vit-base-patch32'
        wrong = dict(name=name)  # whose configuration will say so
    else:
        openai_archive(clip_model(True), tmp_path / 'w.pt')
        torch.manual_seed(0)
        m = clip_model(True)
        openai_archive(m, tmp_path / 'w.pt')
        name = f'open_clip:tiny-quickgelu/{tmp_path / "w.pt"}'
        wrong = dict(name=f'open_clip:tiny/{tmp_path / "w.pt"}')
    return m, name, wrong


@pytest.mark.parametrize('way', ['name', 'hub id', 'file'])
def test_openai_weights_run_quick_gelu_each_way(way, tmp_path, monkeypatch):
    "By open_clip name and tag, by hub id, by file: the same small tower, and never with plain GELU."
    m, name, wrong = openai_weights(way, tmp_path, monkeypatch)
    te = load_text_encoder(name)
    assert te.activation == 'quick_gelu'
    assert same_as(m, te) <= 1e-5
    if way == 'hub id':
        (config,) = (tmp_path / 'hub').rglob('snapshots/*/config.json')
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(hidden_act='gelu')))
    with pytest.raises(ValueError, match=PLAIN):
        load_text_encoder(**wrong)


def test_roberta_and_cls_pooling(tmp_path):
    "Positions of RoBERTa start behind the padding id; a CLS-pooled sentence encoder says so in 1_Pooling."
    import transformers as H
    from tokenizers import ByteLevelBPETokenizer

    b = ByteLevelBPETokenizer()
    b.train_from_iterator(TEXTS * 3, vocab_size=300, special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'])
    b.save_model(str(tmp_path))
    vocab = json.loads((tmp_path / 'vocab.json').read_text())
    lines = (tmp_path / 'merges.txt').read_text().splitlines()
    merges = [tuple(l.split()) for l in lines if l and not l.startswith('#')]
    H.RobertaTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    m = H.RobertaModel(H.RobertaConfig(**size, vocab_size=300, max_position_embeddings=42)).eval()
    m.save_pretrained(tmp_path)
    te = load_text_encoder(f'bert:{tmp_path}')
    i = te.tokenizer(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        x = m(**i).last_hidden_state
    t = te.tokenize(TEXTS)
    w = t.mask[..., None]
    assert torch.equal(t.ids, i['input_ids']) and te.n_ctx == 40
    assert diff(te.encode_text(TEXTS), (x * w).sum(1) / w.sum(1)) <= 1e-5
    te.targets(TEXTS, 30, labels=[['dog'], ['church bells', 'crackling fire'], ['rain']])
    (tmp_path / '1_Pooling').mkdir()
    (tmp_path / '1_Pooling/config.json').write_text('{"pooling_mode_cls_token": true}')
    assert diff(load_text_encoder(f'bert:{tmp_path}').encode_text(TEXTS), x[:, 0]) <= 1e-5


@pytest.mark.parametrize('pad_id', [0, 49407])
def test_pad_id(pad_id):
    te = load_text_encoder('open_clip:tiny', pad_id=pad_id)
    g = te.targets(TEXTS, 20)
    assert set(g.ids[g.kind == PAD].tolist()) == {pad_id}
    assert torch.equal(g.h[g.kind == PAD][0], te.table[pad_id])
    with torch.no_grad():
        assert diff(te.encode_text(TEXTS, n=77), te.locked(open_clip.tokenize(TEXTS))) <= 1e-5


@pytest.mark.parametrize('text', ["It's a dog's  bark &amp; 3 café-cats!", 'GUITAR, (electric)', ''])
def test_open_clip_spans(text):
    "Character spans of the slow tokenizer cover each token."
    te = load_text_encoder('open_clip:tiny')
    seen, spans = te._spans(text)
    ids = te._ids([text])[0]
    assert len(ids) == len(spans)
    for i, (s, e) in zip(ids, spans):
        assert te.tokenizer.decode([i]).strip() in seen[s:e] or not seen[s:e].isascii()


def test_labels_with_parentheses_and_commas():
    te = load_text_encoder('minilm')
    labels = ['Domestic animals, pets', 'Chewing (mastication)']
    g = te.targets(f'This is a sound of {labels[0]}, and {labels[1]}', 24, labels=[labels])
    k = g.kind[0][g.kind[0] != PAD].tolist()
    assert k[:5] == [TEMPLATE] * 5 and k[5:9] == [LABEL] * 4 and k[9:11] == [TEMPLATE] * 2 and set(k[11:]) == {LABEL}


def test_lock_in_a_copy_a_pickle_and_a_checkpoint(tmp_path):
    te = load_text_encoder('open_clip:tiny-quickgelu')
    net = nn.ModuleDict(dict(text=te, head=nn.Linear(4, 4)))
    for twin in copy.deepcopy(net), pickle.loads(pickle.dumps(net)):
        assert twin['text'].fingerprint() == te.fingerprint()
        assert twin['text'].locked is not te.locked
    torch.save(net.state_dict(), tmp_path / 'c.pt')
    assert os.path.getsize(tmp_path / 'c.pt') < 10_000
    fresh = nn.ModuleDict(dict(text=load_text_encoder(te.name), head=nn.Linear(4, 4)))
    fresh.load_state_dict(torch.load(tmp_path / 'c.pt', weights_only=True), strict=True)
    assert fresh['text'].fingerprint() == te.fingerprint()
    assert sum(p.numel() for p in net.parameters()) == 20


def test_gradient_is_right():
    "float64 gradient through a causal tower with presence, against finite differences."
    te = load_text_encoder('open_clip:tiny-quickgelu').double()
    h = te.targets(['a dog'], 3).h.clone().requires_grad_()
    p = torch.full((1, 3), 0.6, dtype=torch.float64, requires_grad=True)
    f = lambda h, p: te.encode_audio_tokens(h, presence=p)[0][:, :4]
    assert torch.autograd.gradcheck(f, (h, p), fast_mode=True)


WANTED = {  # name of an encoder -> what would be downloaded
    'open_clip:ViT-L-14/openai': 'timm/vit_large_patch14_clip_224.openai',
    'hf_clip:openai/clip-vit-base-patch32': 'openai/clip-vit-base-patch32',
    'bert:no-such/model': 'no-such/model',
}


@pytest.mark.parametrize('name, what', WANTED.items())
def test_offline_fails_at_once(name, what, monkeypatch):
    import time

    def snapshot_download(*args, **kwargs):
        raise OSError('not in the cache')

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    t = time.time()
    with pytest.raises(ConnectionError, match='OFFLINE') as e:
        load_text_encoder(name)
    assert what in str(e.value) and 'By hand' in str(e.value) and time.time() - t < 20


def test_offline_tag_with_a_plain_url():
    said = 'cannot download m/t from https://example.org/w.pt: .*By hand.*open_clip:m/PATH'
    with pytest.raises(ConnectionError, match=said):
        W.tag_file('m', 't', dict(url='https://example.org/w.pt'))
