"""Build the documentation site: `make docs`, or `python scripts/build_docs.py [FOLDER]` in an environment for it.

The pages are the Markdown files of the repository, unchanged and in the same folders, so that their links work on the
site too, in the order of docs/README.md; a notebook becomes a page with what it printed and drew. The reference
consists of the docstrings: a page for the public names, and one for the further names of each room. Any warning of
mkdocs, such as one about a broken link, fails the build.
"""

import argparse
import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "saccade"
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
COMMAND = [sys.executable, "-m", "mkdocs", "build", "--strict"]
"""Without `--quiet`, which would silence warnings, and `--strict` then finds none."""
HOME = [{"Overview": "README.md"}, {"All pages": "docs/README.md"}]


def build(output: Path) -> Path:
    """Write the site to `output`/site, replacing the one there, and return its folder.

    Raises:
        subprocess.CalledProcessError: if mkdocs has a warning or an error.
    """
    pages, source = output / "pages", output / "source"
    for folder in (pages, source):
        shutil.rmtree(folder, ignore_errors=True)
    copy_pages(pages)
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        write_notebook(notebook, pages / "docs")
    copy_source(source)
    reference = write_reference(pages / "reference")
    config = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": str(pages),
        "site_dir": str(output / "site"),
        "nav": [*HOME, *sections(), {"Reference": reference}],
    }
    (output / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    subprocess.run(
        [*COMMAND, "--config-file", output / "mkdocs.yml"],
        check=True,
        cwd=output,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    return output / "site"


def copy_pages(folder: Path) -> None:
    """Copy every tracked page, and the files that pages link to or show."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True, check=True)
    for page in map(ROOT.joinpath, listed.stdout.split()):
        linked = (page.parent / target for target in LINK.findall(page.read_text(encoding="utf-8")))
        for path in (page, *linked):
            path = path.resolve()
            if path.is_file():  # mkdocs names the others
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def write_notebook(notebook: Path, folder: Path) -> Path:
    """Write a notebook into `folder` as a page: its text, its code, and what that printed and drew.

    Returns:
        The page. Its pictures lie beside it.
    """
    parts = []
    pictures = 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            drawn = output.get("data", {}).get("image/png")
            if drawn is not None:
                pictures += 1
                picture = folder / f"{notebook.stem}_{pictures}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(base64.b64decode("".join(drawn)))
                parts.append(f"![What the cell above draws]({picture.name})")
            elif "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
    page = folder / f"{notebook.stem}.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def copy_source(folder: Path) -> None:
    """Copy the package; a [`name`] of its docstrings becomes a link to the public name, or the name alone."""
    public = names(PACKAGE / "__init__.py")

    def link(found: re.Match) -> str:
        name = found[1].partition(".")[0]
        return f"[`{found[1]}`][saccade.{found[1]}]" if name in public else f"`{found[1]}`"

    for path in PACKAGE.rglob("*.py"):
        target = folder / path.relative_to(PACKAGE.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"\[`([\w.]+)`\](?![\[(])", link, path.read_text(encoding="utf-8")))


def names(path: Path) -> list[str]:
    """The `__all__` of a module, without importing it; empty if it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            return ast.literal_eval(node.value)
    return []


def write_reference(folder: Path) -> list[dict[str, str]]:
    """Write a page for the public names and one for each room's further names; return their titles and paths."""
    folder.mkdir(parents=True)
    public = names(PACKAGE / "__init__.py")
    listed = [{"saccade": "reference/saccade.md"}]
    text = "# saccade\n\nThe public names, which `from saccade import ...` imports.\n\n"
    (folder / "saccade.md").write_text(text + "".join(f"::: saccade.{name}\n\n" for name in public))
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        room = path.parent.name
        own = [name for name in names(path) if name not in public]
        if own:
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            blocks = "".join(f"::: saccade.{room}.{name}\n\n" for name in own)
            (folder / f"{room}.md").write_text(f"# saccade.{room}\n\n{about}\n\n{blocks}")
            listed.append({f"saccade.{room}": f"reference/{room}.md"})
    return listed


def sections() -> list[dict[str, list[dict[str, str]]]]:
    """The sections of docs/README.md, and the pages that their tables name."""
    _, *parts = re.split(r"^## (.*)$", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        rows = re.findall(r"^\| \[(.*?)\]\(([^)#]+)\)", text, re.MULTILINE)
        if rows:
            pages = [
                {name: str((ROOT / "docs" / page).resolve().relative_to(ROOT).with_suffix(".md"))}
                for name, page in rows
            ]
            found.append({title: pages})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=ROOT / "build" / "docs", help="default: build/docs")
    try:
        site = build(parser.parse_args().output.resolve())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # mkdocs has said why
    print(f"Written to {site}: open {site / 'index.html'}")


if __name__ == "__main__":
    main()
