"""The site builds without a warning and reads well in a real browser."""

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import smoke  # noqa: E402
from nbtools import references  # noqa: E402

BUILD = ["-m", "sphinx", "-b", "html", "-E", "-q", "-W", "--keep-going"]


@pytest.fixture(scope="session")
def built(tmp_path_factory, worker_id):
    "The site, built once for all workers: its folder and what Sphinx said."
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    site, said = base / "site" / "html", base / "site.log"
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            command = [sys.executable, *BUILD, "-d", base / "site" / "doctrees"]
            done = subprocess.run([*command, ROOT / "docs", site], capture_output=True, text=True)
            said.write_text(f"{done.stdout}{done.stderr}" if done.returncode else "")
    return site, said.read_text()


def test_builds_without_warnings(built):
    site, said = built
    assert not said, said
    assert (site / "index.html").exists()


def test_reads_well(built):
    "No console error, no outside request, formulas typeset, search works, fits a phone."
    if not smoke.chromium():
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("no chromium: CI must read the site in a browser")
        pytest.skip("no chromium: install Debian's package `chromium` or Google Chrome")
    complaints = smoke.browse(built[0])
    assert not complaints, "\n" + "\n".join(complaints)


PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("symbols", "glossary")}
CODE = re.compile(r"`([^`]+)`")


def rows():
    "Of each line of the symbol table that has an equation: names in code, and the notebooks of its equations."
    for line in PAGES["symbols"].splitlines():
        cells = line.split("|")
        if len(cells) == 6 and (numbers := references.EQUATION.findall(cells[4])):
            yield CODE.findall(cells[2]), [references.equations()[n] for n in numbers]


def test_symbols_are_where_the_table_says():
    "Each equation exists, and each name in code stands in its notebook."
    known = references.equations()
    assert not [n for n in references.EQUATION.findall(PAGES["symbols"]) if n not in known]
    for names, places in rows():
        text = "\n".join(references.sources()[p] for p in places)
        for name in names:
            assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), f"no `{name}` in {places}"


def test_the_table_has_every_symbol_the_notebooks_name():
    "What a notebook calls a symbol, `In code $x$ is `name``, is in the table, with an equation of that notebook."
    listed = {(place, name) for names, places in rows() for name in names for place in places}
    said = [
        (notebook, name)
        for notebook, text in references.sources().items()
        for sentence in re.findall(r"In code[,:]? ([^\n]*?)(?:[.;](?:\s|$))", text)
        for name in CODE.findall(sentence)
    ]
    assert len(said) > 100 and not set(said) - listed, sorted(set(said) - listed)


def test_the_glossary_is_in_order_and_leads_to_notebooks():
    body = re.search(r"```\{glossary\}\n(.*?)\n```", PAGES["glossary"], re.S)[1]
    entries = [entry.split("\n", 1) for entry in body.split("\n\n")]
    terms = [re.sub(r"\W+", " ", term).lower() for term, _ in entries]
    assert terms == sorted(set(terms)) and len(terms) >= 60
    for term, text in entries:
        places = re.findall(r"\{doc\}`/notebooks/([^`]+)`", text)
        assert places and all(p in references.sources() for p in places), term
        assert text.startswith("  ") and 1 <= text.count(". ") <= 3, term


def test_every_citation_has_an_entry_and_every_entry_is_cited():
    papers, unknown = references.papers(), []
    links = {p.get("link", "").partition(":")[2] for p in papers}
    for notebook, text in references.sources().items():
        said = references.cited(text)
        unknown += [(notebook, words) for words, *who in said if not any(references.means(p, *who, notebook) for p in papers)]
        unknown += [(notebook, i) for i in references.identifiers(text) if i not in links]
    assert not unknown, unknown
    assert not [anchor for anchor, places in references.places().items() if not places]


def test_the_page_of_references_is_complete(tmp_path):
    references.write_page(tmp_path)
    text = (tmp_path / "references.md").read_text()
    entries = text.split("\n\n(")[1:]
    assert len(entries) == len(references.papers()) == len({p["anchor"] for p in references.papers()})
    for paper in references.papers():
        link = paper.get("link", "https:")
        assert re.fullmatch(r"doi:10\.\d{4,9}/\S+|arxiv:\d{4}\.\d{4,5}|https:\S*", link), link
        assert f"({paper['anchor']})=" in text and paper["title"] in text and paper["venue"] in text
    known = references.sources()
    assert all(p in known for p in re.findall(r"\{doc\}`/notebooks/([^`]+)`", text))


@pytest.mark.parametrize(
    "text, found",
    [
        ("(Storn and Price, 1997)", [(["Storn", "Price"], 1997)]),
        ("Nomura, Akimoto and Ono (2023, arXiv 2304.03473)", [(["Nomura", "Akimoto", "Ono"], 2023)]),
        ("(LOZO, Chen et al., 2024, who", [(["Chen"], 2024)]),
        ("Zitzler's (2000), in the unit cube", [(["Zitzler"], 2000)]),
        ("(Sobol', 1993)", [(["Sobol'"], 1993)]),
        ("(Mühlenbein & Schlierkamp-Voosen, 1993; Deb and others, 2002)", [(["Mühlenbein", "Schlierkamp-Voosen"], 1993), (["Deb"], 2002)]),
        ("arXiv 2008.02387, RandomSearch(2000) and a budget of 2000", []),
    ],
)
def test_citations_are_found(text, found):
    assert [tuple(who) for _, *who in references.cited(text)] == found


def test_a_citation_means_its_own_paper():
    def titles(*said):
        return [p["title"].split()[0] for p in references.papers() if references.means(p, *said)]

    assert titles(["Li"], 2018, "4_lm/08_subspace") == ["Measuring"]
    assert titles(["Li"], 2018, "3_bayes/08_multifidelity") == ["Hyperband:"]
    assert titles(["Loshchilov", "Hutter"], 2019) == ["Decoupled"]
    assert titles(["Muehlenbein", "Schlierkamp-Voosen"], 1993) == ["Predictive"]
    assert titles(["Sieberling"], 2025) == titles(["Sieberling"], 2024) == ["EvoPress:"]
    assert not titles(["Hansen"], 2017) and not titles(["Ostermeier"], 2001)
    assert references.identifiers("arXiv:2305.13245, doi 10.1007/BF02288367.") == {"2305.13245", "10.1007/BF02288367"}


def test_the_reference_says_what_is_refused(built):
    "Of a function with checks of its own, and of a class whose checks are its base's."
    for page, texts in {"gfopt.lm.finetune": ["every, patience: …; allowed: a whole number &gt;= 1"],
                        "gfopt.search.swarm": ["phi: …; allowed: a finite number, &gt;= 0 and &lt;= 1", "population"]}.items():
        html = (built[0] / "api" / f"{page}.html").read_text()
        assert "Raises" in html and "ValueError" in html
        assert all(text in html for text in texts), page


def test_formulas_and_citations_are_linked(built):
    "An equation has a place of its own, and the table, the prose and the reference lead to it."
    site = built[0]
    notebook = (site / "notebooks" / "2_search" / "02_genetic.html").read_text()
    assert re.search(r'<div class="math[^>]* id="eq-2-2-2"', notebook)
    assert 'href="../../references.html#ref-baker-1985"' in notebook and 'href="#eq-2-2-1"' in notebook
    assert "notebooks/2_search/02_genetic.html#eq-2-2-2" in (site / "symbols.html").read_text()
    assert "02_genetic.html#eq-2-2-2" in (site / "api" / "gfopt.search.genetic.html").read_text()
    for page in site.rglob("*.html"):
        for number in references.TAG.findall(page.read_text()):
            assert number not in references.equations() or f'id="{references.equation(number)}"' in page.read_text(), (page.name, number)
