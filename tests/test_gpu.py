"""What only a GPU shows: the same numbers as on the CPU, in half precision, compiled, in two passes,
and after an interruption. Skipped where there is none."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from collat.audio import fbank
from collat.benchmarks import make_step, random_weights, sound_shards, synthetic_batch
from collat.checkpoints import read_log
from collat.config import Preempted, load_profile
from collat.training import EachStep, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def profile(**fields):
    return dataclasses.replace(random_weights(load_profile('smoke_clip')), micro_batch=0, **fields)


def loss_and_gradient(p, device='cuda', precision='fp32', compiled=False, b=8):
    model, _ = make_step(p, precision, compiled=compiled)
    model.to(device)
    out = model(synthetic_batch(p, b, device))
    out['loss'].backward()
    return out['loss'].item(), torch.cat([x.grad.reshape(-1) for x in model.parameters() if x.grad is not None]).cpu()


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def full_fp32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_features_equal_the_cpus():
    wav = 0.1 * torch.randn(4, 32_000, generator=torch.Generator().manual_seed(0))
    assert (fbank(wav.cuda()).cpu() - fbank(wav)).abs().max() < 1e-3


def test_loss_and_gradient_equal_the_cpus():
    p = profile(lambda_uni_token=0.0)  # noise comes from the device's own generator
    loss, g = loss_and_gradient(p, 'cpu')
    loss_gpu, g_gpu = loss_and_gradient(p)
    assert abs(loss - loss_gpu) < 1e-4 * loss and apart(g_gpu, g) < 1e-3


@pytest.mark.parametrize('start', ['fixed', 'resample'])
def test_two_passes_equal_one(start):
    p = profile(start=start)
    loss, g = loss_and_gradient(p)
    loss2, g2 = loss_and_gradient(dataclasses.replace(p, micro_batch=3))
    assert abs(loss - loss2) < 1e-5 * loss and apart(g2, g) < 1e-3


def test_half_precision_and_compiled_start_from_the_same_loss():
    loss, g = loss_and_gradient(profile())
    half, g_half = loss_and_gradient(profile(), precision='bf16')
    fast, g_fast = loss_and_gradient(profile(), compiled=True)
    assert abs(half - loss) < 0.02 * loss and apart(g_half, g) < 0.3
    assert abs(fast - loss) < 1e-4 * loss and apart(g_fast, g) < 1e-2


def test_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    p = profile(batch=8, steps=6, eval_every=6, checkpoint_every=2, warmup=1, precision='bf16', fused=True)
    p = dataclasses.replace(p, workers=2, clip_seconds=1.0, shards=str(sound_shards(tmp_path, 32, 1.0)))
    whole = load_file(train(p, tmp_path / 'whole', validate=False) / 'model.safetensors')
    save = EachStep.after_batch

    def preempted(self):
        save(self)
        if self.dls.train.step + 1 == 4:
            raise Preempted('as a cluster would')

    with monkeypatch.context() as m:
        m.setattr(EachStep, 'after_batch', preempted)
        with pytest.raises(Preempted):
            train(p, tmp_path / 'parts', validate=False)
    parts = load_file(train(p, tmp_path / 'parts', validate=False) / 'model.safetensors')
    assert read_log(tmp_path / 'parts')['step'].tolist() == list(range(6))
    assert max(apart(parts[k].float(), whole[k].float()) for k in whole if whole[k].abs().max() > 0) < 1e-2
