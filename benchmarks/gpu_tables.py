"""The tables of what benchmarks/gpu.py has recorded, for the site: `gpu_tables(folder, "run1")`."""

from pathlib import Path
from typing import Any

import pandas as pd

from openunlearn_nb.evaluation.records import read_json

Rows = list[dict[str, Any]]
STEPS = {
    "rows": "rows",
    "checkpointing": "checkpointing",
    "tokens_a_second": "tokens/s",
    "model_flops_utilisation": "utilisation",
    "peak_gb": "peak GB",
    "planned_gb": "planned GB",
}
METRICS = {
    "forget_quality": "forget quality",
    "ks_distance": "KS distance",
    "model_utility": "model utility",
    "forget_truth_ratio": "forget truth ratio",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE",
}
FORMS = {
    "tokens/s": "{:,.0f}",
    "utilisation": "{:.0%}",
    "forget quality": "{:.2g}",
    "rows": "{:.0f}",
    "steps": "{:.0f}",
    "copy, GB/s": "{:,.0f}",
    "bf16 product, TFLOP/s": "{:,.0f}",
    "fp32 product, TFLOP/s": "{:,.0f}",
}


def none_yet(run: str) -> str:
    """What is said where there is no record."""
    return (
        f"No GPU has been at hand for this yet: `python benchmarks/gpu.py {run} --output benchmarks/records` on a "
        "machine with one makes the record, and this page shows it when it is run again."
    )


def records(folder: str | Path, run: str) -> list[dict]:
    """The records of a run, a card each."""
    return [read_json(file, "record") for file in sorted(Path(folder).glob(f"gpu_{run}_*.json"))]


def results(record: dict) -> dict[str, dict]:
    """What blocks have found, by name; a part of what one was to find counts."""
    return {name: entry["result"] for name, entry in record["blocks"].items() if "result" in entry}


def label(record: dict) -> str:
    """The card, and of run2 for how many epochs the models were fine-tuned, and this package's version: what tells its
    records apart."""
    epochs, version = record.get("finetune_epochs"), record["environment"]["openunlearn_nb"]
    return record["card"] + (f", {epochs} epochs, version {version}" if epochs else "")


def named(values: dict, names: dict[str, str]) -> dict:
    return {new: values.get(old) for old, new in names.items()}


def missing(record: dict) -> Rows:
    """Blocks that were not, or not wholly, measured, and why."""
    why = {
        name: next((f"{k}: {entry[k]}" for k in ("failed", "skipped", "unfinished") if k in entry), "")
        for name, entry in record["blocks"].items()
    }
    return [{"measured": name, "why": reason} for name, reason in why.items() if reason]


def ceilings(record: dict) -> Rows:
    names = {
        "copy_gb_a_second": "copy, GB/s",
        "bf16_product_tflops": "bf16 product, TFLOP/s",
        "fp32_product_tflops": "fp32 product, TFLOP/s",
    }
    return [named(of, names) for name, of in results(record).items() if name == "ceilings"]


def steps(record: dict) -> Rows:
    return [{"measured": name, **named(of, STEPS)} for name, of in results(record).items() if "tokens_a_second" in of]


def ratios(record: dict) -> Rows:
    seconds = lambda of: of.get("seconds_a_step", of.get("seconds"))
    return [
        {
            "measured": name.removeprefix("the usual way: "),
            "usual, s": seconds(of["usual"]),
            "ours, s": seconds(of["ours"]),
            "times faster": of["times_faster"],
            "usual, GB": of["usual"]["peak_gb"],
            "ours, GB": of["ours"]["peak_gb"],
        }
        for name, of in results(record).items()
        if "times_faster" in of
    ]


def fine_tunes(record: dict) -> Rows:
    names = {"steps": "steps", "first_loss": "first loss", "last_loss": "last loss", "seconds": "seconds"}
    return [
        {"trained on": name, **named(of, names)}
        for name, of in results(record).get("fine-tuning", {}).items()
        if isinstance(of, dict)
    ]


def sharded(record: dict) -> Rows:
    names = {"steps": "steps", "first_loss": "first loss", "last_loss": "last loss", "seconds": "seconds"}
    found = results(record).get("ZeRO-3", {})
    return [named(found, names) | {"peak GB": found["peak_gb"].get("gpu")}] if "steps" in found else []


def methods(record: dict) -> Rows:
    return [
        {"row": row, **named(of, METRICS), "seconds": of["seconds"]}
        for row, of in results(record).get("methods", {}).items()
    ]


def arithmetic(record: dict) -> Rows:
    found = results(record).get("fp32 and bf16", {})
    return [
        {"row": row, "scored in": dtype, **named(found[dtype][row], METRICS)}
        for row in found.get("fp32", {})
        for dtype in found
        if row in found[dtype]
    ]


def four_bits(record: dict) -> Rows:
    names = {
        "seconds_to_load": "seconds to load",
        "weights_gb": "weights, GB",
        "mean_nll": "mean NLL of what is to be forgotten",
    }
    return [{"weights": kind, **named(of, names)} for kind, of in results(record).get("four bits", {}).items()]


TABLES = {
    "run1": {
        "What the card does at best": ceilings,
        "Training, scoring, generation": steps,
        "Against the usual way": ratios,
        "Not measured": missing,
    },
    "run2": {
        "Fine-tuning": fine_tunes,
        "Methods": methods,
        "The same weights, scored in fp32 and in bf16": arithmetic,
        "In four bits": four_bits,
        "NPO under ZeRO-3, one epoch": sharded,
        "Not measured": missing,
    },
}


def shown(name: str, value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return FORMS.get(name, "{:.3g}").format(value) if number else str(value)


def gpu_tables(folder: str | Path, run: str) -> dict[str, pd.DataFrame]:
    """By title, the tables of a run's records in a folder, each row with its `label`; none where there is no record."""
    tables: dict[str, pd.DataFrame] = {}
    for title, rows_of in TABLES[run].items():
        if rows := [{"card": label(record), **row} for record in records(folder, run) for row in rows_of(record)]:
            tables[title] = (
                pd.DataFrame([{name: shown(name, value) for name, value in row.items()} for row in rows])
                .fillna("")
                .set_index("card")
            )
    return tables
