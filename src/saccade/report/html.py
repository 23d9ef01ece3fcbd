"""A page for people: one HTML file with its pictures inside, for phones too, light and dark, without a network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

# The colours hold a contrast of at least 4.5 against their background in both schemes (WCAG 2.2, level AA).
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f23; --faint: #5a626c; --line: #d5dae0; --card: #f4f6f8;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e7eaed; --faint: #a3acb6; --line: #3a4149;
  --card: #1f2429; --link: #7cb8f5; } .paper { filter: brightness(.88); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
footer { padding-bottom: 2rem; color: var(--faint); font-size: .875rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
p { margin: .5rem 0; max-width: 46rem; }
.lead, figcaption, .caption { color: var(--faint); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 1rem 0 0; padding: 0; }
nav a { display: inline-block; padding: .3rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .75rem; }
.tiles dt { color: var(--faint); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; border: 1px solid var(--line); border-radius: .5rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
.caption { font-size: .9rem; margin: 1rem 0 -.4rem; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; overflow-wrap: normal; }
tbody tr > * { border-top: 1px solid var(--line); }
thead th { background: var(--card); font-weight: 600; vertical-align: bottom; min-width: 5rem; }
tbody th { font-weight: 500; min-width: 7rem; }
.wrap td { overflow-wrap: anywhere; }
.wrap th { min-width: 0; overflow-wrap: anywhere; }
.wrap th:first-child { width: 45%; }
.number { text-align: right; }
td.number { white-space: nowrap; }
tbody th.number { min-width: 0; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; margin-top: .4rem; max-width: 46rem; }
/* The pictures are drawn dark on white: in the dark they keep their paper. */
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure .paper { background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; }
figure.wide .paper { overflow-x: auto; }
figure.wide img { min-width: 40rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem; }
.gallery.large { grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem 1rem; }
.gallery figure { margin: 0; }
.warning { border-left: .3rem solid #d55e00; background: var(--card); padding: .5rem .75rem; }
pre { margin: .5rem 0; padding: .5rem .75rem; background: var(--card); overflow-x: auto; border-radius: .5rem; }
code { font: .875rem ui-monospace, monospace; }
details { margin: .75rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
"""


def page(title: str, lead: str, sections: Mapping[str, Sequence[str]], footer: str) -> str:
    """The whole document.

    Args:
        title: plain text, of the window and of the page.
        lead: plain text under the title.
        sections: heading (plain text) to blocks of HTML, as the functions below make them. Empty ones are left out.
        footer: plain text.
    """
    shown = {heading: blocks for heading, blocks in sections.items() if blocks}
    links = "".join(f'<li><a href="#{_anchor(heading)}">{escape(heading)}</a></li>' for heading in shown)
    body = "\n".join(
        f'<section aria-labelledby="{_anchor(heading)}">\n<h2 id="{_anchor(heading)}">{escape(heading)}</h2>\n'
        + "\n".join(blocks)
        + "\n</section>"
        for heading, blocks in shown.items()
    )
    # The policy makes a promise that browsers keep: whatever a name or a log may hold, nothing is fetched or run.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>{escape(footer)}</p></footer>
</body>
</html>
"""


def paragraph(words: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(words)}</p>"


def command(words: str, shell: str) -> str:
    """A paragraph of plain text and a command under it, in a box that scrolls sideways."""
    return f'{paragraph(words)}\n<pre tabindex="0"><code>{escape(shell)}</code></pre>'


def warning(words: str) -> str:
    """A paragraph of plain text that stands out."""
    return f'<p class="warning"><strong>Note.</strong> {escape(words)}</p>'


def tiles(values: Mapping[str, Any]) -> str:
    """The few numbers to see first, each with its name; None is left out."""
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in values.items()
        if value is not None
    )
    return f'<dl class="tiles">{entries}</dl>'


def fold(summary: str, *blocks: str) -> str:
    """Blocks behind a line of plain text that opens them."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(blocks) + "\n</details>"


def picture(path: Path, alt: str, caption: str = "", wide: bool = False) -> str:
    """A PNG, inside the page.

    Args:
        alt: what it shows, for readers who do not see it.
        caption: plain text under it.
        wide: whether it keeps a width at which its text is readable and scrolls sideways in its own box.
    """
    with Image.open(path) as image:
        width, height = image.size
    data = base64.b64encode(path.read_bytes()).decode()
    scroll = f' role="region" tabindex="0" aria-label="{escape(caption or alt)}"' if wide else ""
    return (
        f'<figure{" class=wide" if wide else ""}><div class="paper"{scroll}><img alt="{escape(alt)}" width="{width}" '
        f'height="{height}" src="data:image/png;base64,{data}"></div>'
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + "</figure>"
    )


def gallery(pictures: Sequence[str], large: bool = False) -> str:
    """Pictures side by side, as many as fit; `large` ones at most two."""
    return f'<div class="gallery{" large" if large else ""}">\n' + "\n".join(pictures) + "\n</div>"


def _anchor(heading: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in heading.lower())
