"""What `make docs` builds its site from: every page in its order, the files that pages link to, every public name."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

import saccade
from scripts import build_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    build_docs.copy_pages(folder)
    return folder


def test_every_page_is_in_the_order_of_the_index() -> None:
    listed = [
        path
        for section in build_docs.sections()
        for pages in section.values()
        for page in pages
        for path in page.values()
    ]
    assert len(listed) == len(set(listed))
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/README.md"}
    notebooks = {f"docs/{path.stem}.md" for path in (ROOT / "docs").glob("*.ipynb")}
    assert notebooks
    assert set(listed) == pages | notebooks | {"CONTRIBUTING.md"}


def test_a_notebook_becomes_a_page_with_what_it_printed_and_drew(tmp_path) -> None:
    page = build_docs.write_notebook(ROOT / "docs" / "quickstart.ipynb", tmp_path / "docs")
    text = page.read_text()
    for cell in json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]:
        assert "".join(cell["source"]) in text
    printed = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    assert "from all tokens, a prompt of 152" in printed
    pictures = build_docs.LINK.findall(text)
    drawn = [name for name in pictures if name.endswith(".png")]
    assert len(drawn) == 2
    for name in drawn:
        with Image.open(page.parent / name) as picture:
            picture.verify()
    assert all((ROOT / "docs" / name).is_file() for name in set(pictures) - set(drawn))


def test_what_pages_link_to_is_copied_with_them(pages) -> None:
    for page in pages.rglob("*.md"):
        assert page.read_bytes() == (ROOT / page.relative_to(pages)).read_bytes()
        for target in build_docs.LINK.findall(page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(pages)}: {target}"
    assert (pages / "docs" / "images" / "kept_tokens.png").is_file()


def test_the_reference_has_every_public_name_once(tmp_path) -> None:
    listed = build_docs.write_reference(tmp_path / "reference")
    found = [re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE) for path in (tmp_path / "reference").iterdir()]
    assert len(found) == len(listed)
    names = [name for one in found for name in one]
    assert len(names) == len(set(names))
    assert {f"saccade.{name}" for name in saccade.__all__} <= set(names)
    assert {"saccade.serving.vllm_request", "saccade.data.digit_scenes"} <= set(names)


def test_names_in_docstrings_become_links_to_public_names_alone(tmp_path) -> None:
    build_docs.copy_source(tmp_path)
    text = (tmp_path / "saccade" / "pruning" / "prune.py").read_text()
    assert "[`PruningConfig`][saccade.PruningConfig]" in text
    brackets = re.compile(r"\[`[\w.]+`\](?!\[)")
    assert [path for path in tmp_path.rglob("*.py") if brackets.search(path.read_text())] == []


def test_warnings_and_broken_links_fail_the_build() -> None:
    class Loader(yaml.SafeLoader):
        """Reads the tags that name Python functions as None."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert set(config["validation"]["links"].values()) == {"warn"}
    assert "--strict" in build_docs.COMMAND
    assert "--quiet" not in build_docs.COMMAND
