"""The site: built without a warning, and no page of it asks another machine for anything."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from browser import dump_dom, needs_chromium
from pages import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))), reason="needs the extra docs"
)


class _Loads(HTMLParser):
    """What a browser fetches for a page; a link that a reader may click is none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "link" and named.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(named.get("href") or "")
        if tag != "a":
            self.found.append(named.get("src") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found
        assert not [name for name in loads.found if name.startswith(("http:", "https:", "//"))]
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8")


_SEARCH = """<script>
const until = (find) => new Promise((done) => {
  const look = () => (find() ? done(find()) : setTimeout(look, 50));
  look();
});
addEventListener("load", async () => {
  const field = await until(() => document.querySelector("input.md-search__input"));
  field.focus();
  field.value = "wudi";
  field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
  await until(() => document.querySelector(".md-search-result__link"));
  const links = [...document.querySelectorAll(".md-search-result__link")].map((a) => a.href);
  document.body.innerHTML = "<pre>" + JSON.stringify(links) + "</pre>";
});
</script>"""


@needs_chromium
@pytest.mark.parametrize("name", ["index.html", "guides/many.html"])
def test_the_search_works_from_a_disk(site: Path, name: str) -> None:
    page = (site / name).with_name("driven.html")
    page.write_text((site / name).read_text("utf-8").replace("</body>", _SEARCH + "</body>"))
    found = re.search(r"<pre>(.*?)</pre>", dump_dom(page, "--virtual-time-budget=60000"))
    page.unlink()
    assert found
    assert f"{(site / 'methods.html').as_uri()}#wudi-iso" in json.loads(found[1])


def test_every_public_name_has_its_place(site: Path) -> None:
    import lora_merge

    text = (site / "reference.html").read_text(encoding="utf-8")
    for name in lora_merge.__all__:
        if name not in ("AdapterLike", "AdaptersLike", "__version__"):  # types, said in api.md
            assert f'.{name}"' in text, name


def test_a_page_that_no_menu_shows_fails_the_build(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "docs", copy / "docs")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    (copy / "src").symlink_to(ROOT / "src")
    (copy / "docs" / "lost.md").write_text("# Lost\n")
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "lost.md" in done.stderr
