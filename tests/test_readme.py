"README says what the committed results say, and no more than fits on two screens."

import re
import tempfile
from pathlib import Path

import nbformat
import pytest

from collat.config import read_results
from collat.stated import restate
from collat.what_holds import headline, verdict_table

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PAGES = 'README.md', *sorted(f'nbs/{f.name}' for f in (ROOT / 'nbs').glob('*.ipynb'))
REFERRED = (  # notebooks all of whose decimals say where they come from
    'nbs/00_config.ipynb',
    'nbs/08b_yamnet.ipynb',
    'nbs/10_losses.ipynb',
    'nbs/11b_optimizer.ipynb',
    'nbs/12_training.ipynb',
    'nbs/13_baselines.ipynb',
    'nbs/20_zero_shot.ipynb',
    'nbs/21_linear_probe.ipynb',
    'nbs/22_retrieval.ipynb',
    'nbs/23_captioning.ipynb',
    'nbs/24_painter.ipynb',
    'nbs/24a_image_generation.ipynb',
    'nbs/24b_stable_diffusion.ipynb',
    'nbs/25_text_retention.ipynb',
    'nbs/26_grounding.ipynb',
    'nbs/27_words.ipynb',
    'nbs/32_esc50.ipynb',
    'nbs/33_recorded_scenes.ipynb',
    'nbs/34_a_recording.ipynb',
    'nbs/40_benchmarks.ipynb',
    'nbs/44_what_holds.ipynb',
    'nbs/51_pipeline.ipynb',
)


def between(name):
    "What stands between two marks."
    return re.search(f'<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->', README, re.S)[1]


def test_the_first_table_is_that_of_the_results():
    assert between('results') == headline(ROOT / 'figures')


def test_the_verdicts_are_those_of_the_long_study():
    assert between('findings') == verdict_table(
        read_results(ROOT / 'figures/mini_long/findings.json')['results']['findings'], first_page=True
    )


def test_both_commands_stand_there_and_every_link_leads_somewhere():
    for command in 'make reproduce', 'make test':
        assert command in README
    for link in re.findall(r'\]\(((?!http)[^)#]+)', README):
        assert (ROOT / link).exists(), f'README links to {link}'


def test_it_is_short():
    "Tables and listings are not counted."
    words = re.sub(r'```.*?```', '', README, flags=re.S)
    prose = re.sub(r'^\|.*$', '', words, flags=re.M)
    assert len(prose.split()) <= 700
    assert len(re.findall(r'^\|---', README, re.M)) <= 2


def prose(page):
    "The Markdown of a page."
    text = (ROOT / page).read_text()
    if page.endswith('.md'):
        return text
    return '\n\n'.join(c.source for c in nbformat.reads(text, 4).cells if c.cell_type == 'markdown')


@pytest.mark.parametrize('page', PAGES)
def test_numbers_in_sentences_are_those_of_the_results(page):
    text = prose(page)
    assert restate(text, ROOT / 'figures') == text, '`python -m collat.stated` writes them anew'


@pytest.mark.parametrize('page', REFERRED)
def test_every_decimal_says_where_it_comes_from(page):
    text = re.sub(r'```.*?```|`[^`]*`|\$[^$]*\$|§[\d.]+', '', prose(page), flags=re.S)
    text = re.sub(r'[\d.,+−-]+( \[[^\]]*\])?<!--.*?-->', '', text)
    assert re.findall(r'.{,40}(?<![\w.])\d+\.\d\d+(?![\w.])', text) == []


def sentences(text):
    "Its sentences and list items, without comments, listings, tables, displayed formulas, headings and link targets."
    text = re.sub(r'<!--.*?-->', '', text, flags=re.S)
    text = re.sub(r'```.*?```|\$\$.*?\$\$|^\|.*?$|^#.*?$', '\n\n', text, flags=re.S | re.M)
    text = re.sub(r'\]\([^)]*\)', ']', text)
    for part in re.split(r'\n\s*\n|^\s*(?:[-*+]|\d+\.)\s+', text, flags=re.M):
        yield from re.split(r'(?<=[.?!])[*)"]*\s+(?=[A-Z§*`(\["])', part.strip())


@pytest.mark.parametrize('page', PAGES)
def test_no_sentence_is_longer_than_forty_words(page):
    "Readers are tired, and English is often not their first language."
    long = [s for s in sentences(prose(page)) if len(s.split()) > 40]
    assert not long, '\n\n'.join(['cut each into two or more:', *long])


def test_the_example_is_what_the_shipped_model_says():
    "README's line about the dog, on the recording of the package from which it was taken."
    from collat.listen import answers, open_model
    from collat.scenes import recorded_clips

    said = re.search(r'^dog\.mp3: (.*)$', README, re.MULTILINE)[1]
    shown = [(name, float(score)) for name, score in re.findall(r'([a-z ]+) (\d\.\d+)', said)]
    with tempfile.TemporaryDirectory() as d:
        wav = next(wav for wav, kind, _ in recorded_clips(d, 'README: the example') if kind == 'dog')
    (answer,) = answers(open_model(), 'classify', wav, [], False)
    assert [l['label'] for l in answer['labels']] == [name.strip() for name, _ in shown]
    assert all(abs(l['score'] - score) < 0.02 for l, (_, score) in zip(answer['labels'], shown))
