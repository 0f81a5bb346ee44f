"""The servers of this folder's tests, each started when the first test asks for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer


class Holder:
    """Starts servers on demand; a test may take one away to end it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self.servers: dict[tuple[str, ...], LiveServer] = {}

    def running(self, *more_flags: str) -> LiveServer:
        """The server with these flags, or a new one; one that died has failed its test already."""
        server = self.servers.get(more_flags)
        if server is not None and server.process.poll() is None:
            return server
        if server is not None:
            self.take(*more_flags).kill()
        self._started += 1
        server = LiveServer(self._folder / f"server-{self._started}.log", more_flags)
        self.servers[more_flags] = server
        try:
            server.wait_until_up()
        except BaseException:
            self.take(*more_flags).kill()
            raise
        return server

    def take(self, *more_flags: str) -> LiveServer:
        """Hand a server over to the caller, who ends it."""
        return self.servers.pop(more_flags)


@pytest.fixture(scope="session")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Holder]:
    """Owner of the servers; ends them after the last test and looks for survivors."""
    holder = Holder(tmp_path_factory.mktemp("server"))
    yield holder
    assert [holder.take(*flags).stop() for flags in list(holder.servers)] in ([], [0], [0, 0])


@pytest.fixture
def server(holder: Holder) -> Iterator[LiveServer]:
    """The shared server; after the test it must be alive and hold nothing."""
    server = holder.running()
    yield server
    server.assert_drained()


@pytest.fixture
def doomed_server(holder: Holder, request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server with the flags in the fixture's parameter that the test ends itself."""
    holder.running(*request.param)
    server = holder.take(*request.param)
    yield server
    server.kill()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that end a server last, so that all others share it."""
    items.sort(key=lambda item: "doomed_server" in getattr(item, "fixturenames", ()))
