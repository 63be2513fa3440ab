"The pipeline end to end on toy notebooks, with real kernels: kill and resume, the lock, the command line."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from collat.config import load_profile
from collat.pipeline import StageError, open_run, plan, run_pipeline
from collat.stages import STAGES, Stage, stages_for

HEAD = """import json
import sys
import time
from pathlib import Path
sys.path.insert(0, '..')
from collat.config import load_profile
run_dir = Path(run_dir)
p = load_profile(profile, overrides)"""
COUNT = """state = run_dir / 'work/state.json'
state.parent.mkdir(exist_ok=True)
seen = json.loads(state.read_text()) if state.exists() else []
for i in range(len(seen), p.steps):
    seen.append(i * p.seed)
    state.with_suffix('.new').write_text(json.dumps(seen))
    state.with_suffix('.new').replace(state)
    time.sleep(0.25)
(run_dir / 'a.json').write_text(json.dumps(seen))
(run_dir / 'resumed').write_text('')"""
DOUBLE = """from toy.mod import double
numbers = json.loads((run_dir / 'a.json').read_text())
(run_dir / 'b.json').write_text(json.dumps([double(x) for x in numbers]))"""
TOY = (Stage('01_count', (), ('a.json',), work=('work/*',)), Stage('02_double', ('a.json',), ('b.json',)))


def notebook(path, *cells):
    cells = ["profile = 'smoke'\nrun_dir = '.'\noverrides = {}", *cells]
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c, id=f'c{i}') for i, c in enumerate(cells)],
        metadata={'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'python3'}},
    )
    nb.cells[0].metadata['tags'] = ['parameters']
    nbformat.write(nb, path)


@pytest.fixture
def toy(tmp_path):
    (tmp_path / 'nbs').mkdir()
    (tmp_path / 'toy').mkdir()
    notebook(tmp_path / 'nbs/01_count.ipynb', HEAD, COUNT)
    notebook(tmp_path / 'nbs/02_double.ipynb', HEAD, DOUBLE)
    (tmp_path / 'toy/mod.py').write_text('def double(x): return 2*x\n')

    def make(run_dir='run', **overrides):
        return open_run(
            'smoke',
            {'steps': 2, 'seed': 3} | overrides,
            tmp_path / run_dir,
            stages=TOY,
            nbs=tmp_path / 'nbs',
            package=tmp_path / 'toy',
        )

    make.root = tmp_path
    return make


def script(root, steps):
    "A process of its own that runs the toy."
    code = f"""import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored
from pathlib import Path
from collat.pipeline import open_run, run_pipeline
from collat.stages import Stage
root = Path({str(root)!r})
toy = (Stage('01_count', (), ('a.json',), work=('work/*',)), Stage('02_double', ('a.json',), ('b.json',)))
where = dict(stages=toy, nbs=root / 'nbs', package=root / 'toy')
run_pipeline(open_run('smoke', dict(steps={steps}, seed=3), root / 'run', **where), progress=True)"""
    return [sys.executable, '-c', code]


def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, 'waited too long'
        time.sleep(0.05)
    return found


def kernels(run_dir):
    def env(p):
        try:
            return p.environ().get('COLLAT_RUN')
        except (psutil.Error, OSError):
            return None

    return [p for p in psutil.process_iter() if env(p) == str(run_dir)]


def test_killed_run_resumes(toy):
    run, state = toy(steps=16), toy.root / 'run/work/state.json'
    p = subprocess.Popen(script(toy.root, 16), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(lambda: state.exists() and 2 <= len(state.read_text().split(',')) < 8)
    (kernel,) = kernels(run.run_dir)
    kernel.suspend()  # even a kernel that would not notice its parent's death
    p.send_signal(signal.SIGKILL)
    p.wait()
    before = len(json.loads(state.read_text()))
    assert not (run.run_dir / 'a.json').exists() and before < 16
    assert plan(run)['01_count'] == ['output a.json is missing']
    state.write_text(json.dumps([-1] + json.loads(state.read_text())[1:]))  # a mark that only a resumed run keeps
    assert run_pipeline(run) == ['01_count', '02_double']
    assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    assert json.loads((run.run_dir / 'a.json').read_text()) == [-1] + [3 * i for i in range(1, 16)]
    assert run_pipeline(toy(steps=16)) == []


def test_changed_parameter_does_not_resume(toy):
    run_pipeline(toy())
    assert plan(toy(seed=5)) == {
        '01_count': ['parameter seed changed 3 → 5'],
        '02_double': ['input a.json will be written by 01_count'],
    }
    run_pipeline(toy(seed=5))
    assert json.loads((toy.root / 'run/b.json').read_text()) == [0, 10]
    (kept,) = (toy.root / 'run/previous/01_count').glob('*/a.json')
    assert json.loads(kept.read_text()) == [0, 3]


def quiet(run):
    "What a run did, and what it said."
    said = []
    try:
        return run_pipeline(run, say=said.append), said
    except StageError as e:
        return str(e), said


def test_finished_work_outlives_failures_and_comes_back_with_its_settings(toy):
    "A slip, another slip, the slip mended: nothing is made again. What was finished under either setting stays."
    fail = COUNT + "\nassert p.seed < 100, 'a slip'"
    notebook(toy.root / 'nbs/01_count.ipynb', HEAD, fail)
    assert quiet(toy())[0] == ['01_count', '02_double']
    made, stamp = (toy.root / 'run/a.json').stat().st_mtime_ns, (toy.root / 'run/stages/01_count.done.json').read_text()
    for seed in (100, 200, 100):
        message, said = quiet(toy(seed=seed))
        assert 'AssertionError: a slip' in message and 'comes back with them' in message
    assert json.loads((toy.root / 'run/a.json').read_text()) == [0, 100]
    (place,) = {
        f.parent for f in (toy.root / 'run/previous/01_count').glob('*/a.json') if json.loads(f.read_text()) == [0, 3]
    }
    assert plan(toy())['01_count'] == [f'comes back from previous/01_count/{place.name}']
    ran, said = quiet(toy())
    assert (
        ran == []
        and any('unfinished work under other settings' in s and 'previous/01_count/' in s for s in said)
        and any('came back' in s for s in said)
    )
    assert (toy.root / 'run/a.json').stat().st_mtime_ns == made and (
        toy.root / 'run/stages/01_count.done.json'
    ).read_text() == stamp
    ran, said = quiet(toy(seed=5))
    assert (
        ran == ['01_count', '02_double']
        and 'what it made under other settings, inputs or code (2 files' in said[0]
        and 'previous/01_count/' in said[0]
    )
    assert quiet(toy())[0] == [] and json.loads((toy.root / 'run/b.json').read_text()) == [0, 6]
    assert quiet(toy(seed=5))[0] == [] and json.loads((toy.root / 'run/b.json').read_text()) == [0, 10]
    (toy.root / 'run/a.json').unlink()  # deleting makes a stage run again
    assert quiet(toy(seed=5))[0] == ['01_count'] and json.loads((toy.root / 'run/a.json').read_text()) == [0, 5]


def test_half_done_work_comes_back_too(toy):
    "Eight of sixteen numbers counted, then another setting, then back: the count goes on."
    notebook(
        toy.root / 'nbs/01_count.ipynb',
        HEAD,
        COUNT.replace('seen.append', "assert i < 8 or (run_dir/'go').exists()\n    seen.append").replace('.25', '0'),
    )
    assert 'AssertionError' in quiet(toy(steps=16))[0]
    state = toy.root / 'run/work/state.json'
    state.write_text(json.dumps([-1] + json.loads(state.read_text())[1:]))  # a mark that only resumed work keeps
    assert quiet(toy(steps=2))[0] == ['01_count', '02_double']
    (toy.root / 'run/go').write_text('')
    assert quiet(toy(steps=16))[0] == ['01_count', '02_double']
    assert json.loads((toy.root / 'run/a.json').read_text()) == [-1] + [3 * i for i in range(1, 16)]


@pytest.mark.parametrize('moves', [0, 1, 2, 3])
@pytest.mark.parametrize('way', ['aside', 'back'])
def test_killed_while_files_move(toy, monkeypatch, moves, way):
    "After a death between any two moves, either setting finds all that was made under it."
    import collat.pipeline as P

    assert quiet(toy())[0] == ['01_count', '02_double']
    if way == 'back':
        assert quiet(toy(seed=5))[0] == ['01_count', '02_double']
    replace, left = os.replace, [moves]

    def dying(a, b):
        if 'previous' in str(a) + str(b):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(P.os, 'replace', dying)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(toy(seed=5 if way == 'aside' else 3), say=lambda s: None)
    for seed in (3, 5) if way == 'aside' else (5, 3):
        ran, _ = quiet(toy(seed=seed))
        assert ran == (
            [] if way == 'back' or seed == 3 else ['01_count', '02_double'][moves // 3 :]
        )  # its first three moves are those of the first stage
        assert json.loads((toy.root / 'run/b.json').read_text()) == [0, 2 * seed]


def test_second_run_is_refused_while_first_runs(toy):
    p = subprocess.Popen(script(toy.root, 60))
    wait_for((toy.root / 'run/work/state.json').exists)
    with pytest.raises(ValueError, match=f'in use by process {p.pid}'):
        run_pipeline(toy(steps=60))
    p.send_signal(signal.SIGINT)
    assert p.wait(30) != 0
    wait_for(lambda: not kernels(toy.root / 'run'))


def test_output_of_a_run_is_quiet(toy):
    done = subprocess.run(script(toy.root, 1), capture_output=True, text=True)
    assert done.returncode == 0
    assert [l.split(':')[0] for l in done.stdout.splitlines()] == [
        '[1/2] 01_count',
        '[1/2] 01_count',
        '[2/2] 02_double',
        '[2/2] 02_double',
    ]
    noise = [
        l
        for l in done.stderr.replace('\r', '\n').splitlines()
        if l.strip() and '01_count' not in l and '02_double' not in l
    ]
    assert noise == []


def test_rerun_reads_nothing_heavy_and_is_fast(toy):
    run_pipeline(toy(), say=lambda s: None)
    code = script(toy.root, 2)[-1] + '\nimport sys; print(sorted({"torch", "papermill"} & set(sys.modules)))'
    t = time.time()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['[1/2] 01_count: up to date', '[2/2] 02_double: up to date', '[]']
    assert time.time() - t < 10


def test_failed_cell_is_named(toy):
    notebook(toy.root / 'nbs/02_double.ipynb', HEAD, '#| eval: false\nraise KeyError("gone")')
    with pytest.raises(StageError, match=r"02_double.ipynb, cell 3 \(`raise KeyError\(\"gone\"\)`\): KeyError: 'gone'"):
        run_pipeline(toy())
    assert (toy.root / 'run/notebooks/02_double.ipynb').exists() and plan(toy())['01_count'] == []


def test_stage_that_writes_nothing_fails(toy):
    notebook(toy.root / 'nbs/01_count.ipynb', HEAD)
    with pytest.raises(StageError, match='did not write a.json'):
        run_pipeline(toy())
    assert plan(toy())['01_count']


SLEEP = """import os
t = time.time()
(run_dir / f'{name}.here').touch()
both = [run_dir / f'{n}.here' for n in ('left', 'right')]
while name in ('left', 'right') and time.time() < t + 120 and not all(f.exists() for f in both):
    time.sleep(0.05)
time.sleep(0.5)
(run_dir / f'{name}.json').write_text(json.dumps([t, time.time(), os.environ.get('OMP_NUM_THREADS')]))"""


def test_stages_run_side_by_side(toy, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    stages = (
        Stage('01_count', (), ('a.json',)),
        *(Stage(f'0{i}_{n}', ('a.json',), (f'{n}.json',)) for i, n in ((3, 'left'), (4, 'right'))),
        Stage('05_last', ('left.json', 'right.json'), ('last.json',)),
        Stage('06_end', (), ('end.json',), alone=True),
    )
    for s in stages[1:]:
        notebook(toy.root / f'nbs/{s.notebook}.ipynb', HEAD, f'name = {s.notebook[3:]!r}', SLEEP)
    run = lambda: open_run(
        'smoke', dict(steps=2, seed=3), toy.root / 'run', stages=stages, nbs=toy.root / 'nbs', package=toy.root / 'toy'
    )
    assert sorted(run_pipeline(run(), jobs=2)) == sorted(s.notebook for s in stages)
    left, right, last, end = (
        json.loads((toy.root / f'run/{n}.json').read_text()) for n in ('left', 'right', 'last', 'end')
    )
    assert left[0] < right[1] and right[0] < left[1], 'the two did not overlap'
    assert last[0] > max(left[1], right[1]) and end[0] > last[1]
    assert left[2] == right[2] == str(max(1, len(os.sched_getaffinity(0)) // 2)) and end[2] is None
    assert run_pipeline(run(), jobs=2) == []


def test_failure_beside_another_stage(toy):
    "The neighbour is finished and kept; what follows is not begun; the error is told."
    stages = (
        Stage('01_count', (), ('a.json',)),
        Stage('02_double', (), ('b.json',)),
        Stage('03_next', ('a.json',), ('c.json',)),
    )
    notebook(toy.root / 'nbs/02_double.ipynb', HEAD, 'raise KeyError("gone")')
    notebook(toy.root / 'nbs/03_next.ipynb', HEAD)
    run = lambda: open_run(
        'smoke', dict(steps=20, seed=3), toy.root / 'run', stages=stages, nbs=toy.root / 'nbs', package=toy.root / 'toy'
    )
    with pytest.raises(StageError, match='02_double'):
        run_pipeline(run(), jobs=2)
    assert plan(run())['01_count'] == [] and not (toy.root / 'run/notebooks/03_next.ipynb').exists()


def test_a_kernel_that_does_not_start_is_tried_three_times(toy, monkeypatch):
    "Between the choice of its ports and their use, another process may take one: ipykernel then ends without answer."
    from collat import pipeline

    usual, starts = pipeline.kernel_class, []

    def unlucky(env, lucky):
        class Kernel(usual(env)):
            def format_kernel_cmd(self, *args, **kw):
                starts.append(1)
                return super().format_kernel_cmd(*args, **kw) if len(starts) > lucky else ['false']

        return Kernel

    monkeypatch.setattr(pipeline, 'kernel_class', lambda env: unlucky(env, 2))
    assert run_pipeline(toy(), ['count']) == ['01_count'] and len(starts) == 3
    starts.clear()
    monkeypatch.setattr(pipeline, 'kernel_class', lambda env: unlucky(env, 9))
    with pytest.raises(StageError, match='01_count.ipynb did not start: .*Kernel died'):
        run_pipeline(toy(seed=5), ['count'])
    assert len(starts) == 3


def test_runs_in_this_interpreter_whatever_is_registered(toy, monkeypatch):
    spec = toy.root / 'jupyter/kernels/python3'
    spec.mkdir(parents=True)
    (spec / 'kernel.json').write_text(json.dumps(dict(argv=['/bin/false'], display_name='wrong', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(toy.root / 'jupyter'))
    monkeypatch.setenv('JUPYTER_PREFER_ENV_PATH', '0')
    notebook(
        toy.root / 'nbs/01_count.ipynb', HEAD, "import sys; (run_dir/'a.json').write_text(json.dumps([sys.prefix]))"
    )
    run_pipeline(toy(), ['count'])
    assert json.loads((toy.root / 'run/a.json').read_text()) == [sys.prefix]


def collat(*args, cwd=None):
    return subprocess.run(
        [sys.executable, '-c', 'from collat.cli import main; main()', *args], capture_output=True, text=True, cwd=cwd
    )


def test_plan_changes_nothing(tmp_path):
    done = collat('run', '--profile', 'smoke', '--plan', '--run-dir', str(tmp_path / 'run'))
    assert done.returncode == 0, done.stderr
    assert [l.split()[0] for l in done.stdout.splitlines() if not l.startswith(' ')] == [
        s.notebook for s in STAGES if not s.extra
    ]
    assert not (tmp_path / 'run').exists()


def test_plan_for_the_gpus_of_another_machine(tmp_path):
    done = collat('run', '--profile', 'paper', '--gpus', '99', '--plan', '--run-dir', str(tmp_path / 'run'))
    assert done.returncode == 0 and '12_training' in done.stdout, done.stderr


@pytest.mark.parametrize(
    'args, said',
    [
        (['run', '--profile', 'mimi'], "Did you mean 'mini'"),
        (['run', 'batchsize=3'], "Did you mean 'batch'"),
        (['run', '--stages', 'trainnig'], "Did you mean 'training'"),
        (['run', '--gpus', '99'], 'this machine has'),
        (['run', 'steps=a'], 'type int'),
        (['profile', 'nope'], 'neither a file'),
    ],
)
def test_refusals_are_one_line(args, said, tmp_path):
    done = collat(*args, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_stage_has_its_notebook_and_parameters():
    from collat.pipeline import check_parameters

    nbs = Path(__file__).parent.parent / 'nbs'
    for s in {*STAGES, *stages_for(load_profile('small'))}:
        check_parameters(nbs / f'{s.notebook}.ipynb')


@pytest.mark.parametrize(
    'profile, changed',
    [('mini', {}), ('mini', dict(pretrain_steps=0)), ('small', {}), ('small', dict(pretrain_steps=3))],
)
def test_inputs_come_from_earlier_stages(profile, changed):
    from fnmatch import fnmatch

    made = []
    for s in stages_for(load_profile(profile, changed)):
        for i in s.inputs:
            assert any(fnmatch(o, i) for o in made), f'{s.notebook} reads {i}, which no earlier stage writes'
        made += s.outputs
