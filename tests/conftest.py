"""Shared by all tests: one torch thread, and one cache of small embedded models for the whole session."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
SHARED = Path(__file__).resolve().parents[2] / "shared"
TRAIN_ROWS = 250  # of the miniature's 2,000: enough for a model that answers, trained in seconds


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # what one process makes, the others use
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["OPENUNLEARN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def eval_logs() -> Path:
    if not (SHARED / "eval_logs").is_dir():
        pytest.skip("the published evaluation logs are not beside this checkout (Hub data set open-unlearning/eval)")
    return SHARED / "eval_logs"


@pytest.fixture(scope="session")
def real_tofu() -> str:
    if not (SHARED / "hub/locuslab/TOFU").is_dir():
        pytest.skip("no local copy of locuslab/TOFU beside this checkout")
    return str(SHARED / "hub/locuslab/TOFU")


@pytest.fixture(scope="session")
def real_muse() -> str:
    if not (SHARED / "hub/muse-bench/MUSE-News").is_dir():
        pytest.skip("no local copy of muse-bench/MUSE-News beside this checkout")
    return str(SHARED / "hub/muse-bench/MUSE-News")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> str:
    """A folder with a few rows of each of the miniature TOFU's configs that forget01 needs: evaluated in a second."""
    from openunlearn_nb.data.tofu import load_tofu, write_tofu

    sizes = {"forget01": 12, "forget01_perturbed": 12, "holdout01": 12, "retain99": 24, "retain_perturbed": 12,
             "real_authors_perturbed": 6, "world_facts_perturbed": 6}
    part = {config: load_tofu(config)[:n] for config, n in sizes.items()}
    return str(write_tofu(tmp_path_factory.mktemp("data"), part | {"full": part["retain99"] + part["forget01"]}))


@pytest.fixture(scope="session")
def muse_grid(tmp_path_factory):
    """A finished MUSE grid of a small model that was taught few texts: its folder, and its configuration."""
    from openunlearn_nb.experiments.grid_config import GridConfig
    from openunlearn_nb.experiments.grid import run_grid

    grid = GridConfig(benchmark="MUSE", train_rows=16, splits=("News",), methods=("GradAscent", "NPO"), epochs=3)
    folder = tmp_path_factory.mktemp("muse")
    assert run_grid(grid, folder, jobs=2, show=False) == []
    return folder, grid


@pytest.fixture(scope="session")
def small_grid(tmp_path_factory):
    """A finished grid of a small model: its folder, and its configuration."""
    from openunlearn_nb.experiments.grid_config import GridConfig
    from openunlearn_nb.experiments.grid import run_grid

    grid = GridConfig(train_rows=TRAIN_ROWS, splits=("forget01",), methods=("NPO", "IdkDPO"), epochs=2)
    folder = tmp_path_factory.mktemp("grid")
    assert run_grid(grid, folder, jobs=2, show=False) == []
    return folder, grid
