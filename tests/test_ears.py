"""The ears in the repository: small, made as their record says, and made again by `make pretrain`."""

import os

import pytest
import torch
from safetensors.torch import load_file

from collat.config import load_profile, read_results
from collat.ears import front_end, make_audio_encoder
from collat.launch import launch
from collat.metrics import accuracy
from collat.model import CoLLAT
from collat.scenes import TRAINED, Scenes
from collat.training import load_audio_encoder, pretrain, shipped_ears


def test_mini_starts_from_shipped_ears_whatever_its_seed(tmp_path):
    p = load_profile('mini', dict(seed=3))
    ears = shipped_ears(p)
    assert ears is not None and (ears / 'ears.safetensors').stat().st_size <= 5e6
    made = pretrain(p, tmp_path)
    assert made.read_bytes() == (ears / 'ears.safetensors').read_bytes()
    assert (tmp_path / 'results/pretrain.json').read_bytes() == (ears / 'pretrain.json').read_bytes()
    model = CoLLAT(p)
    load_audio_encoder(model, made)
    assert not any('running' in k for k in model.state_dict())


@pytest.mark.parametrize(
    'changed',
    [dict(pretrain_lr=1e-3), dict(n_mels=80), dict(d_audio=64), dict(shipped_ears=False), dict(backbone='cnn14')],
)
def test_other_settings_have_other_ears(changed):
    assert shipped_ears(load_profile('mini', changed)) is None


@pytest.mark.skipif('COLLAT_TRUE_SIZE' not in os.environ, reason='an hour on two cores: COLLAT_TRUE_SIZE=1')
def test_trained_again_they_hear_as_well(tmp_path):
    "`make pretrain`, and what the record says of the shipped ears, on single events of `valid`."
    p = load_profile('mini', dict(shipped_ears=False, gpus=2))
    again = launch(p, tmp_path, acts=1)
    shipped = shipped_ears(load_profile('mini'))
    record = read_results(shipped / 'pretrain.json')['results']['valid'][-1]
    valid = Scenes(tmp_path / 'data', 'valid', p)
    wavs, labels = zip(*(valid[i] for i in range(0, len(valid), 2)))
    target = torch.tensor([TRAINED.index(l) for (l,) in labels])

    def top1(file):
        ears = make_audio_encoder(p, len(TRAINED)).fold().eval()
        ears.load_state_dict(load_file(file))
        with torch.no_grad():
            scores = [ears.classify(front_end(part, p)) for part in torch.stack(wavs).split(50)]
        return accuracy(torch.cat(scores), target)

    assert abs(top1(shipped / 'ears.safetensors') - record['top1']) < 1e-6
    assert abs(top1(again) - record['top1']) <= 0.02
