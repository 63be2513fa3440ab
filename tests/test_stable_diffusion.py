"Pictures from token states: Stable Diffusion's classes with a text tower of the true size."

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch

from collat.config import load_profile
from collat.model import CoLLAT
from collat.painter import sound_states, written_states
from collat.reading import compose
from collat.stable_diffusion import check_tower, draw, imagine, load_stable_diffusion, pipeline_folder, pipeline_text
from collat.text_families import load_text_encoder

SMOKE = load_profile('smoke')
NO = 'blurred, many dogs'
PROMPTS = ['a watercolour of a dog beside a church bell', 'rain', '']


def clip_tokenizer():
    "Stable Diffusion's tokenizer, from the vocabulary that open_clip ships; it pads with the end token."
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    tok = SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    vocabulary = {names.get(k, k): v for k, v in tok.encoder.items()}
    t = CLIPTokenizer(vocabulary, sorted(tok.bpe_ranks, key=tok.bpe_ranks.get))
    t.model_max_length = 77
    return t


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A Stable Diffusion pipeline, written by diffusers.

    CLIP ViT-L/14's text transformer has its true size; all weights are random."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp('sd') / 'pipe'
    torch.manual_seed(0)
    size = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    words = dict(vocab_size=49408, max_position_embeddings=77, pad_token_id=1, bos_token_id=49406, eos_token_id=49407)
    text = CLIPTextModel(CLIPTextConfig(**size, **words, hidden_act='quick_gelu', projection_dim=768))
    with torch.no_grad():  # a LayerNorm that does something, or leaving it out could not be seen
        for n, w in text.named_parameters():
            if 'final_layer_norm' in n:
                w.uniform_(0.5, 1.5) if n.endswith('weight') else w.normal_(0, 0.2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    parts = (vae, text, clip_tokenizer(), unet, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def pipe(saved):
    p = load_stable_diffusion(saved, device='cpu')
    p.set_progress_bar_config(disable=True)
    return p


def test_true_size_and_padding(pipe):
    text = pipeline_text(pipe)
    assert (text.d, text.n_layers, text.n_ctx) == (768, 12, 77)
    assert (text.pad_id, text.activation) == (49407, 'quick_gelu')
    assert text.n_params == 123_060_480
    ids = pipe.tokenizer(PROMPTS, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
    assert [row[-1] for row in ids.tolist()] == [49407] * 3
    with torch.no_grad():
        theirs = pipe.text_encoder(ids)[0]
    assert torch.equal(written_states(text, PROMPTS, 75), theirs)


def test_written_prompts_give_the_picture_of_the_pipeline(pipe):
    def by_pipeline(guidance, **more):
        g = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
        few = dict(num_inference_steps=4, output_type='np')
        return pipe(prompt=PROMPTS, guidance_scale=guidance, generator=g, **few, **more).images

    theirs = by_pipeline(7.5, negative_prompt=[NO] * 3)
    states = written_states(pipeline_text(pipe), PROMPTS, 75)
    ours = draw(pipe, states, NO, steps=4, seeds=[5, 6, 7], output='np', progress=False)
    assert np.array_equal(ours, theirs)
    plain = by_pipeline(7.5)  # no negative prompt: ''
    assert np.array_equal(draw(pipe, states, steps=4, seeds=[5, 6, 7], output='np', progress=False), plain)
    assert np.abs(plain - ours).max() > 1e-3, 'the negative prompt must be heard'
    none = draw(pipe, states, steps=4, seeds=[5, 6, 7], guidance=1.0, output='np', progress=False)
    assert np.array_equal(none, by_pipeline(1.0))
    assert np.abs(none - plain).max() > 1e-3


def test_what_the_test_above_can_see(pipe):
    "Another padding id, and states without the final LayerNorm, give another picture."
    text = pipeline_text(pipe)
    few = dict(steps=2, output='np', progress=False)
    right = draw(pipe, written_states(text, PROMPTS[:1], 75), **few)
    h = text.targets(PROMPTS[:1], 75).h
    pad = text.pad_id
    text.pad_id = 0
    assert np.abs(draw(pipe, written_states(text, PROMPTS[:1], 75), **few) - right).max() > 1e-3
    text.pad_id = pad
    with torch.no_grad():
        bare = text.hidden_states(text._surround(h, None)[0])[-1]
    assert np.abs(draw(pipe, bare, **few) - right).max() > 1e-3


def test_the_picture_follows_the_clip(saved, pipe):
    p = dataclasses.replace(SMOKE, text_encoder=f'hf_clip:{saved}/text_encoder', n_tokens=75)
    model = CoLLAT(p).eval()
    g = torch.Generator().manual_seed(0)
    clips = [torch.randn(32_000, generator=g) * 0.1, torch.sin(torch.arange(32_000) * 0.2) * 0.3]
    states = sound_states(model, clips)
    assert states.shape == (2, 77, 768)
    few = dict(steps=2, seeds=3, output='np', progress=False)
    a, b = (imagine(model, pipe, order, **few) for order in (clips, clips[::-1]))
    assert np.array_equal(a, imagine(model, pipe, clips, **few)), 'the same clip, the same picture'
    assert not np.array_equal(a[0], a[1]) and not np.array_equal(a, b), 'another clip, another picture'
    assert np.abs(a - b[::-1]).max() < 1e-3, 'shuffled clips, shuffled pictures'
    composed = compose(model, 'a picture of {audio} without {audio}', clips, slots=75)
    c, d = (draw(pipe, composed.states[None], no, **few) for no in ('', composed.without[0]))
    assert c.shape == a[:1].shape and not np.array_equal(c, d), 'the sound to be left out is heard'
    with pytest.raises(ValueError, match='other word embeddings'):
        torch.manual_seed(9)
        tiny = CoLLAT(dataclasses.replace(SMOKE, text_encoder='open_clip:tiny-quickgelu', n_tokens=20))
        check_tower(tiny, load_text_encoder('open_clip:tiny-quickgelu', seed=5))
    with pytest.raises(ValueError, match='384 wide'):
        imagine(CoLLAT(SMOKE), pipe, clips)


def test_half_precision_and_refusals(saved, tmp_path):
    half = load_stable_diffusion(saved, 'bf16', 'cpu')
    full = load_stable_diffusion(saved, device='cpu')
    states = written_states(pipeline_text(full), ['rain'], 75)
    a, b = (draw(p, states, steps=1, output='np', progress=False) for p in (half, full))
    assert a.shape == (1, 16, 16, 3) and next(half.unet.parameters()).dtype == torch.bfloat16
    assert np.isfinite(a).all() and np.abs(a - b).max() < 0.1
    shutil.copytree(saved, tmp_path / 'both', copy_function=os.symlink)
    # where both lie, fp32 means the full weights
    (tmp_path / 'both/unet/diffusion_pytorch_model.fp16.safetensors').write_bytes(b'never read')
    both = load_stable_diffusion(tmp_path / 'both', device='cpu')
    assert np.array_equal(draw(both, states, steps=1, output='np', progress=False), b)
    with pytest.raises(ValueError, match='fp32, fp16, bf16'):
        load_stable_diffusion(saved, 'fp8')
    with pytest.raises(FileNotFoundError, match='model_index.json'):
        load_stable_diffusion(saved / 'unet')


def test_absent_weights_are_named(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ConnectionError, match='v1-5.*GB.*By hand'):
        pipeline_folder('stable-diffusion-v1-5/stable-diffusion-v1-5')
    with pytest.raises(ConnectionError, match='2 to 6 GB.*hf download some/model'):
        pipeline_folder('some/model')
