"""The site of docs/: built strictly, then read from file:// in a browser, page by page."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxseq

for package in ("mkdocs", "mkdocstrings"):
    pytest.importorskip(package, reason=f"the site needs {package}: pip install -e '.[docs]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the site is read with playwright, which is not installed"
)
if not (CHROMIUM := shutil.which("chromium")):
    pytest.skip("the site is read with Chromium, which is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
REPOSITORY = "https://example.org/jaxseq"  # the theme would ask GitHub and GitLab for the number of stars
# Standard terms, and names in other libraries.
SEARCHED = "truncation", "batch_first", "seq_lengths", "masking", "done", "remat"

# Each gives what is wrong on the page that is open.
FORMULAS = """() => [...document.querySelectorAll(".arithmatex")].flatMap(formula => {
    const svg = formula.querySelectorAll("mjx-container > svg")
    if (svg.length !== 1) return ["a formula is not set: " + formula.textContent]
    const error = svg[0].querySelector("[data-mjx-error]")
    if (error) return ["a formula is wrong: " + error.getAttribute("data-mjx-error")]
    return svg[0].getBoundingClientRect().height < 5 ? ["a formula is too small to read"] : []
})"""
PROSE = """() => {
    const text = document.querySelector("article").cloneNode(true)
    for (const e of text.querySelectorAll("pre, code, mjx-container")) e.remove()
    return (text.textContent.match(/.*(\\$|\\]\\(|\\n *- |\\*\\*).*/g) || []).map(line => "markup in the text: " + line)
}"""
SIZES = """() => [...document.querySelectorAll("article :is(p, li, td)")]
    .filter(e => e.innerText.trim() && parseFloat(getComputedStyle(e).fontSize) < 14)
    .map(e => "small letters: " + e.innerText)"""
# Whatever reaches beyond the screen has to lie in something that scrolls.
WIDTHS = """() => {
    const scrolls = e => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
    const wide = e => e.getBoundingClientRect().right > innerWidth + 1
    return [...document.querySelectorAll("article *")].filter(e => wide(e) && !scrolls(e))
        .map(e => "beyond the screen: " + e.outerHTML.slice(0, 200))
}"""


def test_the_site_reads_from_a_disk(tmp_path):
    """One test, since it builds the site; what is wrong on all pages is said together."""
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DOCS_REPOSITORY": REPOSITORY}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr

    assert f"jaxseq {jaxseq.__version__}" in (site / "index.html").read_text("utf-8")
    wrong = [f"{name} has no entry in the reference" for name in sorted(public_names() - entries(site))]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: wrong.append(f"{page.url}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
        page.on("requestfailed", lambda request: wrong.append(f"{page.url}: no {request.url}"))
        page.on("request", lambda request: wrong.extend(abroad(page, request)))
        pages = [path for path in site.rglob("*.html") if path.name != "404.html" and "source" not in path.parts]
        assert {"index.html", "time.html", "recurrence.html"} <= {path.name for path in pages}
        for path in [*sorted(pages), site / "source/jaxseq/_lstm.py.html"]:
            wrong += [f"{path.relative_to(site)}: {what}" for what in faults(page, path) + wrong_edit_links(path)]
        for word in SEARCHED:
            wrong += search(page, site / "index.html", word)
        browser.close()
    assert not wrong, "\n".join(wrong)


def test_without_a_repository_no_page_has_an_edit_link(monkeypatch):
    from mkdocs.config import load_config
    from mkdocs.structure.files import File
    from mkdocs.structure.pages import Page

    monkeypatch.delenv("DOCS_REPOSITORY", raising=False)
    config = load_config(str(ROOT / "mkdocs.yml"))
    config = config.plugins["docs/site/edit.py"].on_config(config)
    file = File("time.md", config.docs_dir, config.site_dir, config.use_directory_urls)
    assert Page(None, file, config).edit_url is None


def public_names():
    """All of every `__all__`, in full, and the modules that have one; every class for another framework."""
    modules = [jaxseq, *(getattr(jaxseq, name) for name in jaxseq.__all__ if inspect.ismodule(getattr(jaxseq, name)))]
    modules.remove(jaxseq.integrations)  # it imports each framework on use only
    classes = {
        f"jaxseq.integrations.{path.stem}.{name}"
        for path in (ROOT / "jaxseq" / "integrations").glob("[!_]*.py")
        for name in re.findall(r"^class ([A-Z]\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(classes) == 4 * 10
    return {f"{module.__name__}.{name}" for module in modules for name in module.__all__} | classes


def entries(site):
    return {name for page in (site / "api").glob("*.html") for name in re.findall(r' id="([^"]+)"', page.read_text())}


def abroad(page, request):
    return [] if request.url.startswith(("file:", "blob:", "data:")) else [f"{page.url} asks for {request.url}"]


def wrong_edit_links(path):
    """Return what is wrong with the link to the source of a page: there is one, to a file of the repository."""
    links = re.findall(r'<a href="([^"]+)"[^>]* rel="edit"', path.read_text("utf-8"))
    sources = [link.removeprefix(f"{REPOSITORY}/edit/main/") for link in links]
    found = len(sources) == 1 and (ROOT / sources[0]).is_file()
    return [] if found else [f"its source cannot be edited: {links}"]


def faults(page, path):
    """What is wrong with a page, at its desk and on a phone."""
    page.set_viewport_size(DESKTOP)
    page.goto(path.as_uri())
    if page.query_selector(".arithmatex"):
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise")
    found = [*page.evaluate(FORMULAS), *page.evaluate(PROSE)]
    page.set_viewport_size(PHONE)
    width = page.evaluate("document.documentElement.scrollWidth")
    found += [f"{width} pixels wide on a phone"] if width > PHONE["width"] else []
    return found + page.evaluate(WIDTHS) + page.evaluate(SIZES)


def search(page, start, word):
    """What is wrong with the search for a word, and with the page that it finds first."""
    page.set_viewport_size(DESKTOP)
    page.goto(start.as_uri())
    try:
        page.locator("input[name=query]").click()
        page.locator("input[name=query]").press_sequentially(word)
        page.locator(".md-search-result__link").first.click()
    except playwright.Error as error:
        return [f"the search for {word!r} finds nothing: {error}"]
    page.wait_for_load_state()
    missing = word not in page.locator("article").inner_text().lower() or page.url == start.as_uri()
    return [f"the search for {word!r} leads to {page.url}, where it does not stand"] if missing else []
