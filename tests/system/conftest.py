"""The clusters that tests of this folder run on. They start with the first test that asks, and serve all others.

A test that asks for `hosts`, `slurm` or `grid_engine` is marked `system`: `make test-system` runs it, `make test` does
not. After each, what it cut, filled, submitted or left running is put right again.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import runs  # type: ignore[import-not-found]
from grid_engine import GridEngine  # type: ignore[import-not-found]
from hosts import Hosts, NotPossibleError  # type: ignore[import-not-found]
from slurm import Slurm  # type: ignore[import-not-found]

_CLUSTERS = {"hosts", "slurm", "grid_engine"}
_REQUIRED = "TRAIN_SYSTEM_TESTS_REQUIRED"  # set where a skip would hide that nothing was tested


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _CLUSTERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def _standing() -> list[Slurm | GridEngine]:
    """The schedulers that are up."""
    return []


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The hosts login, node1 and node2: see hosts.py."""
    if os.geteuid() != 0:
        _not_here("only root can make network namespaces")
    script = Path(__file__).with_name("install_packages.sh")
    installed = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        _not_here(installed.stderr.strip().splitlines()[-1])
    made = Hosts(tmp_path_factory.mktemp("cluster"), keep=[tmp_path_factory.getbasetemp()])  # tmp_path is shared
    try:
        made.start()
    except NotPossibleError as error:
        _not_here(str(error))
    with made:
        yield made


@pytest.fixture(scope="session")
def slurm(hosts: Hosts, _standing: list[Slurm | GridEngine]) -> Iterator[Slurm]:
    """Slurm on all hosts, slurmctld on login: see slurm.py."""
    with Slurm(hosts) as running:
        _standing.append(running)
        yield running
        _standing.remove(running)


@pytest.fixture(scope="session")
def grid_engine(hosts: Hosts, _standing: list[Slurm | GridEngine]) -> Iterator[GridEngine]:
    """Grid Engine on all hosts, sge_qmaster on login: see grid_engine.py."""
    with GridEngine(hosts) as running:
        _standing.append(running)
        yield running
        _standing.remove(running)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and data in one folder that all hosts see."""
    return runs.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _put_right(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _CLUSTERS & set(request.fixturenames):
        yield
        return
    hosts, standing = request.getfixturevalue("hosts"), request.getfixturevalue("_standing")
    yield
    hosts.mend()
    for scheduler in standing:
        scheduler.heal()
    hosts.end_strays()


def _not_here(reason: str) -> NoReturn:
    if os.environ.get(_REQUIRED):
        pytest.fail(f"{reason} ({_REQUIRED} is set)")
    pytest.skip(reason)
