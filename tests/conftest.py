"Side by side, the longest tests start first, and those that share an expensive fixture stay together."
import pytest

FIRST = 'test_smoke.py', 'test_faults.py', 'test_public.py', 'test_listen.py', 'test_streaming.py'
TOGETHER = FIRST[1:] + ('test_evaluate_data.py', 'test_image_generation.py', 'test_model.py')


def pytest_collection_modifyitems(items):
    place = {n: i for i, n in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))
    for item in items:
        if item.path.name in TOGETHER: item.add_marker(pytest.mark.xdist_group(item.path.stem))
