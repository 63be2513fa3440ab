"AST at the size of the paper, and its gradients: too slow or too dull for the notebook."

import json

import pytest
import torch

from collat.audio_encoder import AST, AST_SIZES, classification_loss, from_hf_ast


def test_base_has_the_published_shape():
    transformers = pytest.importorskip('transformers')
    with torch.device('meta'):
        m = AST(128, 1024, **AST_SIZES['base'], n_classes=527)
        published = transformers.ASTForAudioClassification(transformers.ASTConfig(num_labels=527))
        h_a = m(torch.empty(2, 1024, 128))
    assert h_a.shape == (2, 1214, 768)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in published.parameters())


def test_published_layout_gives_equal_states_at_full_input(tmp_path):
    transformers = pytest.importorskip('transformers')
    from safetensors.torch import load_file

    torch.manual_seed(0)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    config = transformers.ASTConfig(**size, layer_norm_eps=1e-6)
    hf = transformers.ASTModel(config).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.1)
    hf.save_pretrained(tmp_path)
    ours = from_hf_ast(load_file(tmp_path / 'model.safetensors'), json.loads((tmp_path / 'config.json').read_text()))
    spec = torch.randn(1, 1024, 128)
    with torch.no_grad():
        theirs = hf(spec).last_hidden_state
        h_a = ours(spec)
    assert h_a.shape == (1, 1214, 64) and ours.head is None and not ours.training
    assert h_a.std() > 0.05 and (h_a - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize('stem', ['patch', 'conv'])
def test_gradients_in_bf16_and_state_round_trip(stem):
    torch.manual_seed(0)
    m = AST(64, 98, d=32, depth=2, heads=2, stem=stem, n_classes=3, drop_path=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        logits = m.classify(torch.randn(4, 98, 64))
    classification_loss(logits.float(), torch.eye(3)[[0, 1, 2, 0]]).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in m.parameters())
    other = AST(64, 98, d=32, depth=2, heads=2, stem=stem, n_classes=3).eval()
    other.load_state_dict(m.state_dict())
    x = torch.randn(2, 60, 64)
    assert torch.equal(other(x), m.eval()(x))


def test_drop_path_rises_to_the_last_layer():
    m = AST(64, 98, d=32, depth=3, heads=2, drop_path=0.2)
    assert [getattr(b.drop_path1, 'drop_prob', 0.0) for b in m.blocks] == [0.0, 0.1, 0.2]


def test_sigmoid_loss_accepts_clips_without_label():
    loss = classification_loss(torch.zeros(2, 3), torch.zeros(2, 3), 'sigmoid')
    assert torch.isclose(loss, torch.tensor(2.0).log())
