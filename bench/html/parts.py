"""The pieces that sections are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualmatch.runtime.page import Markup, shown

STYLE = """
header p { max-width: 60rem; } nav { display: flex; flex-wrap: wrap; gap: .35rem 1rem; margin: 1rem 0 0; padding: .6rem 0; border-block: 1px solid var(--line); }
figure.plot-box { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: start; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem; margin: .8rem 0; }
figure.plot-box > svg { flex: 1 1 19rem; max-width: 28rem; } figure.plot-box > .wide { flex: 1 1 24rem; min-width: 0; } figure .heading { flex: 0 0 100%; font-weight: 600; font-size: .9rem; margin: 0; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); align-items: start; margin: .8rem 0; } .plots > figure.plot-box { margin: 0; }
details { margin: .4rem 0; } summary { cursor: pointer; color: var(--tone1); }
dl { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; } dt { color: var(--soft); } dd { margin: 0; }
code { display: block; width: fit-content; max-width: 100%; margin-top: .15rem; background: var(--card); border: 1px solid var(--line); border-radius: .25rem; padding: .05rem .3rem; }
li.todo { margin: .5rem 0; }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a title, to which the contents link by `key`; `body` is HTML."""

    key: str
    title: str
    body: Sequence[str]

    def html(self) -> str:
        """The section."""
        return f'<section id="{self.key}">\n<h2>{shown(self.title)}</h2>\n' + "\n".join(self.body) + "\n</section>"


def figure(plot: Markup, numbers: str = "", *, heading: str = "") -> Markup:
    """A plot, its heading above and its numbers below."""
    head = f'<p class="heading">{shown(heading)}</p>' if heading else ""
    return Markup(f'<figure class="plot-box">{head}{plot}{numbers}</figure>')


def plots(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="plots">{"".join(figures)}</div>'
