"""What `make docs` builds its site from: every page in its order, the files that pages link to, every public name."""

import re
from pathlib import Path

import pytest
import yaml

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
    assert set(listed) == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/README.md"} | {
        "CONTRIBUTING.md"
    }


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
