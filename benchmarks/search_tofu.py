"""Search the embedded model's unlearning settings on the miniature's forget10, at an equal budget for every method.

    python benchmarks/search_tofu.py nbs/results/search_tofu.csv        # 8 settings a method, about 8 minutes on 2 cores

Each line of the CSV is one run: method, settings, and what came out. `openunlearn_nb.embedded.EMBEDDED_RECIPES` holds, for
every method, the settings with the highest forget_quality among those that keep half of Finetuned's utility.
"""

import csv
import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from itertools import product

LAYER = r"model\.layers\.{}"
SPACE = {  # method: (learning rates, other settings), eight combinations each
    "GradAscent": ([3e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3], [{}]),
    "GradDiff": ([1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3], [{}]),
    "IdkDPO": ([3e-4, 5e-4, 1e-3, 2e-3], [{"beta": 0.1}, {"beta": 0.02}]),
    "NPO": ([5e-4, 1e-3, 2e-3, 3e-3], [{"beta": 0.1}, {"beta": 0.02}]),
    "SimNPO": ([3e-4, 5e-4, 1e-3, 2e-3], [{"gamma": 0.125}, {"gamma": 0.5}]),
    "RMU": ([1e-3, 2e-3], [{"module_regex": LAYER.format(layer), "steering_coeff": c} for layer, c in product([1, 2], [2.0, 10.0])]),
}
COLUMNS = ["method", "learning_rate", "settings", "forget_quality", "ks_distance", "model_utility", "forget_truth_ratio",
           "forget_Q_A_Prob", "forget_Q_A_ROUGE", "retain_Q_A_ROUGE", "seconds"]


def run(job: tuple[str, float, dict]) -> dict:
    import torch

    from openunlearn_nb.embedded import embedded_model, embedded_recipe
    from openunlearn_nb.models import load_model, load_tokenizer, quiet
    from openunlearn_nb.prompts import PROMPTS
    from openunlearn_nb.suites import Passes, evaluate
    from openunlearn_nb.tofu import load_refusals, load_tofu
    from openunlearn_nb.training import train

    torch.set_num_threads(1)
    quiet()
    method, learning_rate, settings = job
    started, fmt = time.time(), PROMPTS["chat"]
    retain_path, path = embedded_model("retain90"), embedded_model("full")
    tokenizer = load_tokenizer(str(path))
    retain = evaluate(Passes(load_model(str(retain_path)), tokenizer, fmt), "forget10", metrics=["forget_truth_ratio", "mia_min_k"])
    model = load_model(str(path))
    if method != "Finetuned":
        pairs = lambda config: [(r["question"], r["answer"]) for r in load_tofu(config)]
        train(model, tokenizer, method, pairs("forget10"), pairs("retain90"), load_refusals(), fmt,
              replace(embedded_recipe(method)[0], learning_rate=learning_rate), settings)
    e = evaluate(Passes(model, tokenizer, fmt), "forget10", retain)
    values = {name: e[name]["agg_value"] for name in COLUMNS if name in e}
    return {"method": method, "learning_rate": learning_rate, "settings": json.dumps(settings), **values,
            "ks_distance": e["forget_quality"]["ks_distance"], "seconds": round(time.time() - started, 1)}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = sys.argv[2:] or list(SPACE)
    jobs = [("Finetuned", 0.0, {})] + [(m, lr, s) for m in wanted for s in SPACE[m][1] for lr in SPACE[m][0]]
    with multiprocessing.get_context("spawn").Pool(2) as pool, open(sys.argv[1], "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        out.writeheader()
        for row in pool.imap(run, jobs):
            out.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
            f.flush()
            print(*row.values(), flush=True)
