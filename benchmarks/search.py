"""Search an embedded model's unlearning settings, at an equal budget for every method.

    python benchmarks/search.py TOFU nbs/results/search_tofu.csv     # forget10, eight settings a method, 12 to 17 minutes on 2 cores
    python benchmarks/search.py MUSE nbs/results/search_muse.csv     # News, one learning rate for all methods, about 3 minutes

Methods named after the file (`TOFU out.csv UNDIAL,WGA`) are searched alone, and their lines added to it.

Each line of the CSV is one run: method, settings, and what came out. The chapter on the embedded model says what is chosen
from it and asserts that `embedded_recipe` is that choice.
"""

import csv
import functools
import json
import multiprocessing
import os
import sys
import time
import warnings

LAYER = r"model\.layers\.{}"
TOFU = {  # method: (learning rates, other settings), eight combinations each
    "GradAscent": ([3e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3], [{}]),
    "GradDiff": ([1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3], [{}]),
    "IdkDPO": ([3e-4, 5e-4, 1e-3, 2e-3], [{"beta": 0.1}, {"beta": 0.02}]),
    "NPO": ([5e-4, 1e-3, 2e-3, 3e-3], [{"beta": 0.1}, {"beta": 0.02}]),
    "SimNPO": ([1e-3, 2e-3, 4e-3, 8e-3], [{"gamma": 0.125}, {"gamma": 0.5}]),
    "RMU": ([5e-4, 1e-3, 2e-3, 4e-3], [{"module_regex": LAYER.format(layer)} for layer in (1, 2)]),
    "UNDIAL": ([1e-3, 2e-3, 4e-3, 8e-3], [{"alpha": 0.0}, {"alpha": 1.0}]),
    "AltPO": ([5e-4, 1e-3, 2e-3, 4e-3], [{"beta": 0.1}, {"beta": 0.02}]),
    "SatImp": ([5e-4, 1e-3, 2e-3, 4e-3], [{"gamma": 0.1}, {"gamma": 1.0}]),
    "WGA": ([5e-4, 1e-3, 2e-3, 4e-3], [{"beta": 1.0}, {"beta": 0.2}]),
    "CEU": ([5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3], [{}]),
    "PDU": ([5e-4, 1e-3, 2e-3, 4e-3], [{"retain_loss_eps": 0.1}, {"retain_loss_eps": 0.3}]),
}
RATES = [5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
MUSE = {"GradAscent": (RATES, [{}]), "GradDiff": (RATES, [{}]), "NPO": (RATES, [{}]), "SimNPO": (RATES, [{}]),
        "RMU": (RATES, [{"module_regex": LAYER.format(2)}])}
SPACES = {"TOFU": ("forget10", TOFU), "MUSE": ("News", MUSE)}
SEEDS = {"TOFU": 3, "MUSE": 0}  # TOFU's pair is none of those on which the picks run again
MORE = {"TOFU": ["ks_distance", "retain_Q_A_ROUGE"], "MUSE": []}


def columns(benchmark: str) -> list[str]:
    from openunlearn_nb.data.benchmark import BENCHMARKS

    return ["method", "learning_rate", "settings", *BENCHMARKS[benchmark].default_metrics, *MORE[benchmark], "seconds"]


@functools.cache
def evaluation_of_retain(benchmark: str) -> dict:
    from openunlearn_nb.evaluation.evaluate import evaluate
    from openunlearn_nb.experiments.config import RunConfig
    from openunlearn_nb.experiments.run_models import model_path, open_model

    split, seed = SPACES[benchmark][0], SEEDS[benchmark]
    config = RunConfig(benchmark=benchmark, seed=seed, embedded_seed=seed)
    return evaluate(*open_model(config, model_path(config, split, retain=True), False), config.source, split).entries


def run(job: tuple[str, str, float, dict]) -> dict:
    import torch

    from openunlearn_nb.models.loading import quiet
    from openunlearn_nb.experiments.config import RunConfig
    from openunlearn_nb.experiments.run_models import model_path, open_model
    from openunlearn_nb.experiments.unlearning import unlearn
    from openunlearn_nb.evaluation.evaluate import evaluate

    torch.set_num_threads(1)
    quiet()
    warnings.filterwarnings("ignore", message="No retain log")  # Retain's own evaluation has none
    benchmark, method, learning_rate, settings = job
    started, split = time.time(), SPACES[benchmark][0]
    seed = SEEDS[benchmark]
    config = RunConfig(benchmark=benchmark, learning_rate=learning_rate or None, seed=seed, embedded_seed=seed)
    retain = evaluation_of_retain(benchmark)
    model, enc = open_model(config, model_path(config, split), for_training=True)
    if method != "Finetuned":
        unlearn(config, method, split, model, enc, settings)
    e = evaluate(model, enc, config.source, split, retain).entries
    values = {name: e[name]["agg_value"] for name in columns(benchmark) if name in e}
    values |= {"ks_distance": e["forget_quality"]["ks_distance"]} if "forget_quality" in e else {}
    return {"method": method, "learning_rate": learning_rate, "settings": json.dumps(settings), **values,
            "seconds": round(time.time() - started, 1)}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    benchmark, out, *only = sys.argv[1:4]
    space = SPACES[benchmark][1]
    names = only[0].split(",") if only else list(space)
    jobs = [(benchmark, m, lr, s) for m in names for s in space[m][1] for lr in space[m][0]]
    if not only:
        jobs.insert(0, (benchmark, "Finetuned", 0.0, {}))
    head = columns(benchmark)
    if only:  # the file's own columns
        with open(out, encoding="utf-8") as f:
            head = next(csv.reader(f))
    with multiprocessing.get_context("spawn").Pool(2) as pool, open(out, "a" if only else "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, head, lineterminator="\n", extrasaction="ignore")
        if not only:
            table.writeheader()
        for row in pool.imap(run, jobs):
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            f.flush()
            print(*row.values(), flush=True)
