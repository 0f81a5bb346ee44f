"""An SGLang frontend program, unchanged, on a server with our scheduler.

Start a server with ``make serve``, then run ``python examples/frontend_program.py``. One fork per
city runs at the same time and shares the prefix that all of them have in common.
"""

import argparse

import sglang as sgl

CITIES = ("Lisbon", "Oslo", "Kyoto")


@sgl.function
def travel_guide(s, cities):
    s += "You write short and friendly travel guides.\n"
    forks = s.fork(len(cities))
    for fork, city in zip(forks, cities, strict=True):
        fork += f"A day in {city}: " + sgl.gen("day", max_tokens=40, stop="\n")
    for fork, city in zip(forks, cities, strict=True):
        s += f"A day in {city}: {fork['day']}\n"
    s += "The best city for a rainy weekend is " + sgl.select("choice", choices=list(cities))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server")
    url = parser.parse_args().url

    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    state = travel_guide.run(cities=CITIES, temperature=0.7)
    print(state.text())
    print("choice:", state["choice"])


if __name__ == "__main__":
    main()
