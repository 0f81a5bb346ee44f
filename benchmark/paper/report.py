"""Tables and plots of the runs that were done: ``python -m benchmark.paper.report``.

Owns the command. It runs nothing; what was not run is shown as ``-``.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmark.paper.known import Known
from benchmark.paper.run import add_paper_arguments, paper_of
from benchmark.paper.store import Store
from benchmark.paper.tables import TABLES


def refresh(page: str, tables: Mapping[str, str]) -> str:
    """Put tables into a page.

    Args:
        page: the page; a table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
        tables: by name.

    Returns:
        The page with these tables; those that it has no place for are left out.

    Raises:
        ValueError: it has a place for none of them.
    """
    put = 0
    for name, text in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        place = re.compile(f"{begin}.*?{end}", re.DOTALL)
        page, count = place.subn(lambda _, new=f"{begin}\n{text}\n{end}": new, page)
        put += count
    if not put:
        raise ValueError(
            f"the page has no place for a table: add <!-- begin NAME --> and <!-- end NAME --> "
            f"with NAME one of {', '.join(tables)}"
        )
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or put them into a page; draw the plots.

    Args:
        argv: arguments; by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.paper.report",
        description="Tables and plots of the runs of python -m benchmark.paper, which are of the "
        "version of the code that ran last, unless with --keep.",
    )
    add_paper_arguments(parser)
    add = parser.add_argument
    add("--page", type=Path, metavar="FILE.md", help="put the tables into this page; else print")
    add("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as SVG")
    options = parser.parse_args(argv)
    try:
        store = Store(options.out, None, keep=options.keep)
        known = Known(paper_of(options), store)
        tables = {name: write(known) for name, write in TABLES.items()}
        if options.page is None:
            print("\n\n".join(f"## {name}\n\n{text}" for name, text in tables.items()))
        else:
            page = options.page.read_text(encoding="utf-8")
            options.page.write_text(refresh(page, tables), encoding="utf-8")
        if options.plots is not None:
            from benchmark.paper.plots import draw, save

            options.plots.mkdir(parents=True, exist_ok=True)
            for name, figure in draw(known).items():
                save(figure, str(options.plots / f"paper-{name}.svg"))
    except ImportError:
        print(
            "benchmark.paper.report: plots need matplotlib: pip install 'econoserve[report]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except (ValueError, OSError) as error:
        print(f"benchmark.paper.report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.page is not None and options.quick:
        print(f"--quick: the figures now in {options.page} mean nothing", file=sys.stderr)
    versions = ", ".join(sorted(store.versions))
    print(
        f"{len(store)} runs of code {versions}, {store.wall_s:.0f} s of a core; "
        f"{store.stale} lines of other versions not used; at least {len(known.missing)} runs "
        "are missing for these tables",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
