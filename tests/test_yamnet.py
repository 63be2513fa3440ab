"YAMNet: fetched, tried, and held against what Google's own runtime says."

import numpy as np
import pytest
import torch
from test_datasets import BLOCK, QUIET, remote, server  # noqa: F401

from collat import yamnet
from collat.downloads import DownloadError
from collat.yamnet import YAMNet, get_yamnet, load_yamnet, write_keras, yamnet_names


def test_get_continues_tries_and_removes_what_is_damaged(server, tmp_path, monkeypatch):
    net = YAMNet().eval()
    write_keras(tmp_path / 'made.h5', net)
    whole = (tmp_path / 'made.h5').read_bytes()
    names = remote(server, '/yamnet_class_map.csv', b'index,mid,display_name\n0,/m/0,"Bark, bow"\n')
    weights = yamnet.Remote(remote(server, '/yamnet.h5', whole).url)  # no checksum, as for the real one
    monkeypatch.setattr(yamnet, 'REMOTES', (weights, names))
    server.plan[:] = [BLOCK]
    folder = get_yamnet(tmp_path / 'data', **QUIET)
    assert server.log[:2] == [None, f'bytes={BLOCK}-'] and len(server.log) == 3
    spec = torch.randn(1, 96, 64)
    with torch.no_grad():
        assert torch.equal(load_yamnet(folder / 'yamnet.h5')(spec), net(spec))
    assert yamnet_names(folder / 'yamnet.h5') == ['Bark, bow']
    get_yamnet(tmp_path / 'data', **QUIET)
    assert len(server.log) == 3  # nothing is fetched twice
    (folder / 'yamnet.h5').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="yamnet.h5: these are not YAMNet's weights .*collat data get yamnet"):
        get_yamnet(tmp_path / 'data', **QUIET)
    get_yamnet(tmp_path / 'data', **QUIET)
    assert (folder / 'yamnet.h5').read_bytes() == whole


def test_without_a_network_the_way_by_hand_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(yamnet, 'REMOTES', tuple(yamnet.Remote('http://127.0.0.1:9/yamnet.h5') for _ in 'ab'))
    with pytest.raises(DownloadError, match='By hand: put the file at .*yamnet/yamnet.h5'):
        get_yamnet(tmp_path, tries=1, **QUIET)


@pytest.mark.data('yamnet')
def test_scores_are_those_of_the_original(data):
    from ai_edge_litert.interpreter import Interpreter

    graph = Interpreter(str(data))
    graph.allocate_tensors()
    (into,), (out,) = graph.get_input_details(), graph.get_output_details()
    patch = torch.from_numpy(np.fromfile(data.with_name('yamnet_test_spectra.bin'), np.float32)).reshape(1, 96, 64)
    for spec in (patch, patch.flip(1), patch - 3):
        graph.set_tensor(into['index'], spec.numpy())
        graph.invoke()
        with torch.no_grad():
            ours = load_yamnet(data).scores(spec)[0, 0].numpy()
        assert np.abs(ours - graph.get_tensor(out['index'])[0]).max() < 0.03
