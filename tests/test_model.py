"""The whole model: embeddings that do not depend on company or run, and gradients that do not depend on the number of
processes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from collat.backbones import BACKBONES
from collat.config import load_profile
from collat.model import CoLLAT

HERE = Path(__file__).parent
NAMES = 'flute violin trumpet piano harp guitar drum bell rain wind dog cat cow'.split()


@pytest.fixture(scope='module')
def model():
    return CoLLAT(load_profile('smoke')).eval()


def clips(n, seconds=2.0, seed=0):
    return list(torch.randn(n, int(16_000 * seconds), generator=torch.Generator().manual_seed(seed)) * 0.1)


def test_embeddings_do_not_depend_on_batch_size_or_mates(model):
    sounds = clips(5) + clips(3, 1.37, 1) + clips(2, 7.9, 2)
    together = model.encode_audio(sounds)
    for size in (1, 2, 3):
        assert (model.encode_audio(sounds, batch_size=size) - together).abs().max() <= 1e-5
    mixed = model.encode_audio(sounds[::-1]).flip(0)
    assert (mixed - together).abs().max() <= 1e-5
    assert torch.allclose(together.norm(dim=-1), torch.ones(len(sounds)), atol=1e-6)


def test_embeddings_are_the_same_in_another_process(model):
    code = (
        'import torch; from collat.config import load_profile; from collat.model import CoLLAT;'
        'torch.set_num_threads(%d);'
        'w = torch.randn(3, 32000, generator=torch.Generator().manual_seed(0)) * .1;'
        "print(CoLLAT(load_profile('smoke')).eval().encode_audio(w).numpy().tobytes().hex())" % torch.get_num_threads()
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == model.encode_audio(torch.stack(clips(3))).numpy().tobytes().hex()


@pytest.mark.parametrize('profile', ['smoke', 'smoke_clip'])
@pytest.mark.parametrize(
    'override',
    [
        {},
        {'form': 'raw'},
        {'token_layer': 1},
        {'start': 'resample'},
        {'counts': 'words', 'targets': 'diagonal', 'matcher': 'hungarian'},
    ],
)
def test_every_option_gives_gradients_to_all_that_learns(profile, override):
    model = CoLLAT(load_profile(profile, override)).train()
    before = model.text.fingerprint()
    batch = dict(
        wav=torch.stack(clips(3)),
        seeds=[1, 2, 3],
        texts=['This is a sound of flute', 'This is a sound of piano, and guiro', 'This is a sound of flute'],
        labels=[['flute'], ['piano', 'guiro'], ['flute']],
    )
    out = model(batch)
    out['loss'].backward()
    assert torch.isfinite(out['loss']) and out['dist_label'] > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert model.text.fingerprint() == before


@pytest.mark.parametrize('backbone', BACKBONES[1:])
def test_another_backbone_learns_and_keeps_its_batch_statistics(backbone, tmp_path):
    model = CoLLAT(load_profile('smoke', dict(backbone=backbone))).train()
    statistics = {k: v.clone() for k, v in model.state_dict().items() if 'running_' in k}
    batch = dict(
        wav=torch.stack(clips(2)),
        seeds=[1, 2],
        texts=['This is a sound of flute', 'This is a sound of piano'],
        labels=[['flute'], ['piano']],
    )
    model(batch)['loss'].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert statistics and all(torch.equal(v, model.state_dict()[k]) for k, v in statistics.items())
    model.save_pretrained(tmp_path / 'm')
    again = CoLLAT.from_pretrained(tmp_path / 'm')
    assert torch.equal(again.encode_audio(clips(2)), model.eval().encode_audio(clips(2)))


def test_a_backbone_that_is_none_or_has_no_such_weights():
    with pytest.raises(ValueError, match="'cnn41' is not one of ast, cnn14"):
        CoLLAT(load_profile('smoke', dict(backbone='cnn41')))
    with pytest.raises(ValueError, match="is read by ast, yamnet, own only; with backbone='cnn14' '' is accepted"):
        CoLLAT(load_profile('smoke', dict(backbone='cnn14', audio_weights='hf:x')))


def test_token_losses_at_a_deeper_layer_keep_their_unit():
    """States are larger than static embeddings; in units of their layer the target of Eq. 1 is about as far from zero
    at every layer."""
    texts, labels = ['This is a sound of flute', 'This is a sound of piano'], [['flute'], ['piano']]

    def far(layer):
        model = CoLLAT(load_profile('smoke', dict(token_layer=layer)))
        return float(model.at_layer(model.text_targets(texts, labels)[0]).abs().mean()) / model.loss.embed_scale

    assert all(0.5 < far(l) < 2 for l in (0, 2, 4, 6))


@pytest.mark.parametrize(
    'profile, ranks, micro',
    [('smoke', 2, 0), ('smoke_clip', 2, 3), ('smoke', 4, 1), (dict(base='smoke', ears='frozen', presence=True), 2, 3)],
)
def test_ranks_and_micro_batches_equal_one_process(profile, ranks, micro, tmp_path):
    "float64: unequal text lengths, duplicate prompts across ranks, `logit_scale` included."
    one = tmp_path / 'one.pt'
    two = tmp_path / 'two.pt'
    script = str(HERE / 'model_ranks.py')
    if isinstance(profile, dict):
        (tmp_path / 'p.json').write_text(json.dumps(profile))
        profile = str(tmp_path / 'p.json')
    subprocess.run([sys.executable, script, profile, str(one), '0'], check=True, capture_output=True)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    subprocess.run([*torchrun, script, profile, str(two), str(micro)], check=True, capture_output=True)
    a, b = (torch.load(f, weights_only=True) for f in (one, two))
    assert set(a) == set(b) and 'logit_scale' in a and len(a) > 40
    for k in a:
        assert (a[k] - b[k]).abs().max() <= 1e-8 * a[k].abs().max().clamp_min(1e-12), k


@pytest.mark.clock
def test_matching_is_a_small_part_of_a_training_step():
    model = CoLLAT(load_profile('mini', dict(precision='fp32'))).train()
    labels = [[a, b] for a, b in zip(NAMES, NAMES[1:])]
    texts = [f'This is a sound of {a}, and {b}' for a, b in labels]
    batch = dict(wav=torch.stack(clips(len(texts), 3.0)), seeds=list(range(len(texts))), texts=texts, labels=labels)
    h_t, kind, _ = model.text_targets(texts, labels)
    h_at = model.interaction.start_for(len(texts)) + torch.randn(len(texts), *h_t.shape[1:]) * model.text.embed_scale

    def seconds(f):
        f()
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    share = seconds(lambda: model.loss.align(h_at, h_t, kind)) / seconds(lambda: model(batch)['loss'].backward())
    assert share <= 0.05, f'{share:.1%} of a step at {len(texts)} clips'
