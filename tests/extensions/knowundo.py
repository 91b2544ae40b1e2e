"""KnowUnDo (arXiv 2407.01920) as a benchmark of one's own: what is private is forgotten, what is public is retained.

Its rows have text (a question) and labels (the answer). Training rows and validation rows are two files a side, and
scores are of validation: the teacher-forced token accuracy, on the side to forget as 1 - accuracy."""

from openunlearn_nb.data.benchmark import Benchmark, benchmark
from openunlearn_nb.data.sources import load_rows
from openunlearn_nb.evaluation.metric import metric


@metric("token_accuracy", reads="answer", range=(0, 1), better="lower", on_retain="higher", paper="arXiv 2407.01920")
def token_accuracy(row):
    """Share of an answer's tokens that are the model's first choice, with the true tokens before them."""
    return float(row["hits"].mean()) if len(row["hits"]) else None


@metric("unlearn_success", takes="entries", range=(0, 1), better="higher", paper="arXiv 2407.01920")
def unlearn_success(accuracy):
    """1 - the accuracy on what is forgotten."""
    return None if accuracy["agg_value"] is None else 1 - accuracy["agg_value"]


@benchmark("KnowUnDo")
class KnowUnDo(Benchmark):
    """Private facts to forget, public ones to retain."""

    data_help = "a folder with unlearn_train.json, unlearn_val.json, retention_train.json and retention_val.json"
    metrics = {
        "forget_accuracy": "token_accuracy(forget/answer)",
        "retention_success": "token_accuracy(retain/answer)",
        "unlearn_success": "unlearn_success(forget_accuracy)",
        "forget_ROUGE": "rouge_recall(forget/generation)",
        "retain_ROUGE": "rouge_recall(retain/generation)",
    }
    columns = default_metrics = shown = ("unlearn_success", "retention_success", "forget_ROUGE", "retain_ROUGE")
    counted, quoted = "forget_accuracy", "forget_ROUGE"

    def rows(self, name):
        return [{"question": row["text"], "answer": row["labels"]} for row in load_rows(self.data, name)][:self.max_rows]

    def data_sets(self, split):
        return {"forget": "unlearn_val", "retain": "retention_val"}

    def forget_rows(self, split):
        return self.rows("unlearn_train")

    def retain_rows(self, split):
        return self.rows("retention_train")
