"""Side by side, the longest tests start first, and those that share an expensive fixture stay together.

A test that needs data which is not in the repository is marked `data(NAME)`, one that takes minutes `slow`.
What was not run is listed at the end, with the reason.
"""

import pytest

from collat.config import AUDIOCAPS_TEST, find_data
from collat.recordings import LISTS

FIRST = 'test_smoke.py', 'test_faults.py', 'test_public.py', 'test_listen.py', 'test_streaming.py'
TOGETHER = FIRST[1:] + ('test_evaluate_data.py', 'test_image_generation.py', 'test_model.py')
DATA = dict(  # name -> what it may be called below a data folder, how to get it
    audiocaps=(AUDIOCAPS_TEST, '`.venv/bin/collat data get audiocaps` fetches the captions'),
    class_labels=(('class_labels',), "put the folder class_labels of LAION's CLAP (on GitHub, CC0) into data/"),
    esc50=(LISTS, '`.venv/bin/collat data get esc50` fetches it'),
    yamnet=(
        ('yamnet/yamnet_spectra_in.tflite',),
        "put Google's quantised YAMNet, its class map, test audio and test spectra into data/yamnet/",
    ),
)


@pytest.fixture
def data(request):
    "Where the data lies that the test's mark asks for."
    name = request.node.get_closest_marker('data').args[0]
    names, _ = DATA[name]
    return find_data(*names)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker('slow') and 'slow' not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason='takes minutes: `.venv/bin/python -m pytest -m slow` runs it'))
    place = {n: i for i, n in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))
    for item in items:
        if item.path.name in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        for mark in item.iter_markers('data'):
            names, how = DATA[mark.args[0]]
            if find_data(*names) is None:
                reason = f'{mark.args[0]} is in no data folder (COLLAT_DATA, else data/): {how}'
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    if skipped:
        terminalreporter.section('not run, and why')
    for report in sorted(skipped, key=lambda r: r.nodeid):
        terminalreporter.line(f'{report.nodeid}: {report.longrepr[2].removeprefix("Skipped: ")}')
