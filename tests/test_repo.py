"Gates on the repository itself: notebooks, modules, imports, sizes, settings."

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
MODULES = sorted(p for p in (ROOT / 'collat').glob('*.py') if not p.name.startswith('_'))
cfg = ConfigParser(delimiters=['='])
cfg.read(ROOT / 'settings.ini')
cfg = cfg['DEFAULT']
ids = lambda p: p.stem


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def source(cell):
    return ''.join(cell['source'])


def exported(path):
    return [s for c in cells(path) if re.search(r'^#\|\s*exports?\b', s := source(c), re.M)]


def number_of():
    "module -> number of its notebook"
    return {
        m[1]: nb.stem.split('_')[0]
        for nb in NOTEBOOKS
        for c in cells(nb)
        if (m := re.search(r'^#\|\s*default_exp (\w+)', source(c), re.M))
    }


def imports(tree):
    "(module of collat, line) for each import"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((a.name.split('.')[1], n.lineno) for a in n.names if a.name.startswith('collat.'))
        elif isinstance(n, ast.ImportFrom):
            base = n.module or ''
            if n.level or base.startswith('collat.'):
                yield (base.removeprefix('collat.') or n.names[0].name), n.lineno
            elif base == 'collat':
                yield from ((a.name, n.lineno) for a in n.names)


def test_one_notebook_one_module():
    for nb in NOTEBOOKS:
        names = [m[1] for c in cells(nb) if (m := re.search(r'^#\|\s*default_exp (\S+)', source(c), re.M))]
        if re.match(r'\d\d[a-z]?_', nb.stem):
            assert names in ([], [nb.stem.split('_', 1)[1]]), f'{nb.name} exports to {names}'
        assert names or not exported(nb), f'{nb.name} exports without default_exp'
    assert {p.stem for p in MODULES} == set(number_of()), 'modules and notebooks differ'


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_imports_go_down(path):
    number = number_of()
    for m, line in imports(ast.parse(path.read_text())):
        if m.startswith('__'):
            continue
        assert m in number, f'{path.name}:{line} imports collat.{m}, which no notebook makes'
        assert number[m] < number[path.stem], f'{path.name}:{line} imports collat.{m} from a later notebook'


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_no_module_uses_private_names_of_another(path):
    tree = ast.parse(path.read_text())
    modules = {p.stem for p in MODULES}
    ours = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('collat')):
            private = [a.name for a in n.names if re.match('_(?!_)', a.name)]
            assert not private, f'{path.name}:{n.lineno} imports {private}'
            ours |= {a.asname or a.name for a in n.names if a.name in modules}
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in ours:
            assert not n.attr.startswith('_'), f'{path.name}:{n.lineno} uses {n.value.id}.{n.attr}'


BETWEEN_EVALUATIONS = {
    'grounding': {'painter'},  # Figure 1a shows what the painter of 24 makes of the sound
    'image_generation': {'painter'},  # whose pictures are looked at
    'stable_diffusion': {'painter'},  # drives another painter with the same states
    'public_sets': {'zero_shot', 'linear_probe', 'retrieval', 'captioning'},  # calls these four, as `collat eval` does
    'listen': {'captioning'},  # the captioner of 23 answers
    'architecture': {'ablations'},  # variants that are trained in the same way
    'recorded_scenes': {'ablations'},  # the same weights of the losses
    'own_ears': {'grounding', 'painter'},  # the picture of the first page
}


def test_no_evaluation_imports_another():
    "What they share stands below 20; all imports go down (above), so there is no circle either."
    number = number_of()
    evaluations = {m for m, n in number.items() if '20' <= n < '40'}
    between = {}
    for m in evaluations:
        if used := {i for i, _ in imports(ast.parse((ROOT / f'collat/{m}.py').read_text()))} & evaluations:
            between[m] = used
    assert between == BETWEEN_EVALUATIONS


SAME_NAME = {'main', 'draw'}  # programs; pictures (24b), blocks (43)


def test_one_name_one_function():
    "Across modules; methods that are patched into a class belong to the class."
    places = {}
    for path in MODULES:
        for n in ast.parse(path.read_text()).body:
            patched = any('patch' in ast.unparse(d) for d in getattr(n, 'decorator_list', ()))
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') and not patched:
                places.setdefault(n.name, []).append(path.stem)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert set(twice) == SAME_NAME, twice


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_no_star_imports_and_no_side_effects(path):
    for n in ast.walk(tree := ast.parse(path.read_text())):
        assert not (isinstance(n, ast.ImportFrom) and n.names[0].name == '*'), f'{path.name}:{n.lineno} star import'
    for n in tree.body:
        assert 'os.environ[' not in (ast.unparse(n) if isinstance(n, (ast.Assign, ast.Expr)) else ''), (
            f'{path.name}:{n.lineno} sets the environment at import'
        )


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_direct_dependencies_are_pinned(path):
    pins = {
        w.split('==')[0].lower().replace('_', '-')
        for k in ('requirements', 'dev_requirements', 'merlin_requirements')
        for w in cfg[k].split()
    }
    dists = importlib.metadata.packages_distributions()
    tree = ast.parse(path.read_text())
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    for name in names - set(sys.stdlib_module_names) - {'collat'}:
        assert pins & {d.lower().replace('_', '-') for d in dists.get(name, [name])}, (
            f'{path.name} imports {name}, which settings.ini does not pin'
        )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_notebook_form(path):
    nb = json.loads(path.read_text())
    names = [c.get('id') for c in nb['cells']]
    assert all(names) and len(set(names)) == len(names), 'every cell needs its own id'
    first = source(nb['cells'][0])
    assert nb['cells'][0]['cell_type'] == 'markdown' and re.match(r'# .+\n\n> .+', first), (
        'first cell: title and one sentence'
    )
    assert not any('nbdev_export()' in source(c) for c in cells(path)), (
        'nbdev_export() would rewrite the package in mid-run'
    )


def test_the_sequence_and_not_nbdev_runs_the_stages():
    "The parameters of a stage, and so its Run section, are left out by nbdev_test; the small benchmarks are not."
    from collat.config import load_profile
    from collat.stages import stages_for

    stages = {s.notebook for name in ('mini', 'esc50', 'small') for s in stages_for(load_profile(name))}
    for name in sorted(stages - {'40_benchmarks'}):
        tagged = [c for c in cells(ROOT / f'nbs/{name}.ipynb') if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1 and source(tagged[0]).startswith('#| eval: false'), name


STATEMENTS = 30  # of a function, its own line apart


@pytest.mark.parametrize('path', MODULES, ids=ids)
def test_functions_are_short(path):
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.FunctionDef):
            size = sum(isinstance(x, ast.stmt) for x in ast.walk(n)) - 1
            assert size <= STATEMENTS, f'{path.name}:{n.lineno} {n.name} has {size} statements'


NESTED = 20  # comprehensions inside comprehensions, in all


def test_few_comprehensions_are_nested():
    kinds = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    nested = []
    for path in MODULES:
        for n in ast.walk(ast.parse(path.read_text())):
            if isinstance(n, kinds) and any(isinstance(m, kinds) for m in ast.walk(n) if m is not n):
                nested.append(f'{path.name}:{n.lineno}')
    assert len(nested) <= NESTED, nested


DRAWS = 'normal random integers choice permutation shuffle standard_normal multinomial uniform bytes'.split()
TORCH_DRAWS = 'torch.randn torch.rand torch.randint torch.randperm torch.randn_like torch.rand_like'.split()


def bound(tree):
    "Names that a cell gives a value to."
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }


def draws(tree):
    "Names of the generators that a cell draws from; 'torch' where it is torch's own."
    for n in ast.walk(tree):
        if not isinstance(n, ast.Call):
            continue
        given = [k.value.id for k in n.keywords if k.arg == 'generator' and isinstance(k.value, ast.Name)]
        yield from given
        if ast.unparse(n.func) in TORCH_DRAWS and not any(k.arg == 'generator' for k in n.keywords):
            yield 'torch'
        match n.func:
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if attr in DRAWS:
                yield name


@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_each_cell_draws_from_a_generator_of_its_own(path):
    "So that no optional cell changes what another one draws."
    for cell in cells(path):
        code = source(cell)
        tree = ast.parse('\n'.join(l for l in code.splitlines() if not l.startswith(('%', '!'))))
        mine = bound(tree) | {'np', 'random'} | ({'torch'} if 'manual_seed' in code else set())
        if '#| export' in code:
            continue
        assert not (others := set(draws(tree)) - mine), f'{sorted(others)} of another cell in: {code[:100]}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)
def test_notebook_outputs(path):
    size = 0
    for c in cells(path):
        for o in c['outputs']:
            size += len(json.dumps(o))
            text = (
                ''.join(o.get('text', ''))
                + ''.join(o.get('data', {}).get('text/plain', ''))
                + ''.join(o.get('data', {}).get('text/html', ''))
            )
            assert o['output_type'] != 'error', f'an error is stored: {source(c)[:80]}'
            assert not (m := re.search(r'(?<![\w.])/(root|tmp|home|work)/\S*', text)), (
                f'machine path in an output: {m[0]}'
            )
            assert not (m := re.search(r'\w*Warning\b.*', text)), f'warning in an output: {m[0]}'
            assert not (m := re.search(r'<.* at 0x[0-9a-f]+>', text)), f'object address in an output: {m[0]}'
    assert size <= 100_000, f'{size} bytes of outputs'


def test_tracked_files_are_small():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for f in files:
        if not (ROOT / f).is_file():
            continue
        limit = 10_000_000 if f.endswith('.safetensors') else 1_000_000
        assert (ROOT / f).stat().st_size <= limit, f'{f} is larger than {limit} bytes'
    assert not [
        f
        for f in files
        if f.startswith(('runs/', '.venv/'))
        or f.startswith('data/')
        and f not in ('data/README.md', 'data/own_ears.csv')
    ]


def test_nothing_knows_a_folder_beside_the_clone():
    word = 'sha' + 'red'
    said = subprocess.run(
        [
            'git',
            'grep',
            '-nE',
            rf'\b{word}/|/{word}\b',
            '--',
            'nbs',
            'collat',
            'tests',
            'Makefile',
            'README.md',
            'data',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert not said, said


@pytest.mark.xdist_group('together')
def test_a_group_of_tests_stays_on_one_worker(request):
    "xdist knows a group by its name in the id of a test, which pytest 9.2.0 dropped without a word."
    grouped = bool(request.config.getoption('loadgroup', False))
    assert request.node.nodeid.endswith('@together') == grouped


def test_import_is_light():
    heavy = {'torch', 'numpy', 'transformers', 'papermill', 'fastcore'}
    code = f'import sys, collat; print(*sorted({heavy} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ''


@pytest.mark.clock
@pytest.mark.parametrize('flag', ['--help', '--version'])
def test_command_line_starts_at_once(flag):
    code = f"""import sys, time
t = time.time()
try:
    from collat.cli import main
    main(["{flag}"])
except SystemExit as e:
    assert not e.code
assert time.time() - t < 1, time.time() - t"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_dead_option():
    """Every field of a profile is read somewhere: an attribute of its name in a module other than `config`,
    or in a cell of a Run section, or as the weight of a loss term."""
    import dataclasses

    from collat.config import Profile
    from collat.losses import LOSS_TERMS

    code = [p.read_text() for p in MODULES if p.stem != 'config'] + [
        source(c)
        for nb in NOTEBOOKS
        if nb.stem != '00_config'
        for c in cells(nb)
        if not source(c).lstrip().startswith(('%', '!'))
    ]
    read = {n.attr for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
    read |= {t.weight for t in LOSS_TERMS.values()}
    assert not (dead := [f.name for f in dataclasses.fields(Profile) if f.name not in read]), (
        f'profile fields that nobody reads: {dead}'
    )


def test_kept_profiles_load():
    "Of every committed result and model, those included that know a former field."
    from collat.config import RETIRED, load_profile, migrated

    kept = {f: json.loads(f.read_text()) for f in sorted((ROOT / 'figures').rglob('*.json'))}
    profiles = [
        b if f.name == 'config.json' else b['profile'] for f, b in kept.items() if 'steps' in b or 'profile' in b
    ]
    assert len(profiles) > 20 and any(set(RETIRED) <= set(was) for was in profiles)
    for was in profiles:
        now = load_profile('mini', was)
        assert all(getattr(now, k) == v for k, v in migrated(was).items())


def test_every_option_is_turned_by_a_variant():
    """A field that accepts a few words, or yes and no, and shapes a training has a variant in `GROUPS`,
    or a profile has another value; numbers are sizes."""
    import dataclasses

    from collat.ablations import GROUPS
    from collat.config import PROFILES, Profile, changing

    options = {f.name for f in dataclasses.fields(Profile) if f.metadata['one_of'] or isinstance(f.default, bool)}
    turned = {k for o in PROFILES.values() for k in o}
    turned |= {k for group in GROUPS.values() for o in group.values() for k in o}
    assert not (idle := (options & changing('weights')) - turned - {'precision'}), idle  # of the machine: notebook 40


def test_settings():
    assert cfg['allowed_cell_metadata_keys'] == 'tags' and cfg['clean_ids'] == 'True' and cfg['tst_flags'] == 'slow gpu'
    assert cfg['console_scripts'] == 'collat=collat.cli:main'
    words = [w for k in ('requirements', 'dev_requirements', 'merlin_requirements') for w in cfg[k].split()]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', w) for w in words), 'every direct dependency is pinned'
    have = {w.split('==')[0] for w in words}
    assert {
        'jupyterlab',
        'nbdev',
        'torch',
        'torchaudio',
        'open_clip_torch',
        'fastai',
        'seaborn',
        'pycocoevalcap',
        'papermill',
        'pytest',
    } <= have
    import collat

    assert collat.__version__ == cfg['version']


FAKE = """#!/bin/bash
[ "$1" = -c ] && exit 0
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip"; exit; fi
echo "$*" >> calls
case "$*" in *install*) [ -e network ];; esac
"""


def test_an_interrupted_installation_starts_anew(tmp_path):
    "With a Python that only notes what it is asked for; its pip fails as long as there is no file `network`."
    for f in 'Makefile', 'settings.ini', 'setup.py', 'pyproject.toml':
        shutil.copy(ROOT / f, tmp_path)
    (tmp_path / 'python').write_text(FAKE)
    (tmp_path / 'python').chmod(0o755)
    make = lambda: subprocess.run(['make', 'setup', 'PYTHON=./python'], cwd=tmp_path, capture_output=True, text=True)
    assert make().returncode != 0 and not (tmp_path / '.venv/.installed').exists()
    (tmp_path / '.venv/half a package').touch()
    (tmp_path / 'network').touch()
    again = make()
    assert again.returncode == 0 and 'starts anew' in again.stdout and (tmp_path / '.venv/.installed').exists(), (
        again.stderr
    )
    assert not (tmp_path / '.venv/half a package').exists()
    calls = (tmp_path / 'calls').read_text()
    assert (
        make().returncode == 0
        and (tmp_path / 'calls').read_text() == calls
        and calls.count('install') == 2
        and calls.splitlines()[-1].endswith('check')
    )
