"""LUME (SemEval-2025 task 4) as a benchmark of one's own: twelve scores over three tasks, two sides and two forms of question.

Its rows have id, input, output and task; an id that holds `sc` is a text to complete, one that holds `qa` a question."""

from openunlearn_nb.data.benchmark import Benchmark, benchmark
from openunlearn_nb.data.sources import load_rows
from openunlearn_nb.evaluation.metric import metric
from openunlearn_nb.evaluation.metrics import harmonic_mean

TASKS, FORMS = ("Task1", "Task2", "Task3"), ("sc", "qa")
SETS = {f"{side}_{task}_{form}": (side, task, form) for side in ("forget", "retain") for task in TASKS for form in FORMS}


@metric("lume_match", reads="generation", range=(0, 1), better="lower", on_retain="higher", paper="arXiv 2502.15097")
def lume_match(row):
    """1 where the answer is the true one, stripped and in small letters."""
    if row["generation"] is None:
        return None
    return float(row["generation"].strip().lower() == row["answer"].strip().lower())


@metric("lume_aggregate", takes="entries", range=(0, 1), better="higher", on_retain="higher", paper="arXiv 2502.15097")
def lume_aggregate(*entries, context):
    """The harmonic mean of the twelve scores, those of what is to be forgotten as 1 - score."""
    scores = [entry["agg_value"] for entry in entries]
    return harmonic_mean([s if s is None or name.startswith("retain") else 1 - s for name, s in zip(context.inputs, scores)])


@benchmark("LUME")
class Lume(Benchmark):
    """Stories, invented people and biographies to forget, others of the same kind to keep."""

    data_help = "a folder with forget.jsonl and retain.jsonl (id, input, output, task)"
    metrics = {
        **{name: f"{'rouge_recall' if name.endswith('sc') else 'lume_match'}({name}/generation)" for name in SETS},
        "forget_Prob": "probability(forget/answer)",
        "forget_ROUGE": "rouge_recall(forget/generation)",
        "task_aggregate": f"lume_aggregate({', '.join(SETS)})",
    }
    retained = tuple(name for name in SETS if name.startswith("retain"))
    default_metrics = (*SETS, "task_aggregate", "forget_Prob")
    columns = shown = ("task_aggregate", "forget_Task1_sc", "forget_Task2_qa", "retain_Task1_sc", "retain_Task2_qa")
    counted, quoted = "forget_Prob", "forget_ROUGE"

    def rows(self, name):
        side, task, form = SETS.get(name, (name, "", ""))
        found = [row for row in load_rows(self.data, side) if row["task"].startswith(task) and form in row["id"]]
        return [{"question": row["input"], "answer": row["output"]} for row in found][:self.max_rows]

    def data_sets(self, split):
        """The twelve, as far as there are rows, and both sides as a whole."""
        return {name: name for name in ("forget", "retain", *SETS) if self.rows(name)}
