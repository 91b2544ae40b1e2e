"""RWKU (arXiv 2406.10890) as a benchmark of one's own: people to forget, their neighbours to retain.

A split is a person. The forget rows are texts about them; three levels of questions ask for what should be gone, two
for what should stay. Scored is the ROUGE-L recall of at most 30 new tokens."""

from openunlearn_nb.data.benchmark import Benchmark, benchmark
from openunlearn_nb.data.sources import load_rows

LEVELS = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")


@benchmark("RWKU")
class Rwku(Benchmark):
    """A person's text to forget, questions about them and about their neighbours."""

    splits = ()
    split_words = ("person", "people")
    new_tokens = 30
    hub_id = "jinzhuoran/RWKU"
    data_help = f"a folder with forget_target.json and {', '.join(LEVELS)}"
    metrics = {f"{level}_ROUGE": f"rouge_recall({level}/generation)" for level in LEVELS} | {
        "forget_Prob": "probability(forget/answer)",
    }
    retained = ("neighbor_level1", "neighbor_level2")
    columns = default_metrics = shown = tuple(f"{level}_ROUGE" for level in LEVELS)
    counted, quoted = "forget_Prob", "forget_level2_ROUGE"

    def available_splits(self):
        return list(dict.fromkeys(row["subject"] for row in load_rows(self.data, "forget_target")))

    def rows(self, name):
        level, subject = name.split("/")
        found = [row for row in load_rows(self.data, level) if row["subject"] == subject]
        return [{"text": row["text"]} if "text" in row else {"question": row["query"], "answer": row["answer"]} for row in found]

    def data_sets(self, split):
        self.check_split(split)
        return {"forget": f"forget_target/{split}"} | {level: f"{level}/{split}" for level in LEVELS}

    def forget_rows(self, split):
        return self.rows(f"forget_target/{split}")

    def retain_rows(self, split):
        return [row for other in self.available_splits() if other != split for row in self.rows(f"forget_target/{other}")]

    def reference_answers(self, split):
        return [row["answer"] for row in self.rows(f"forget_level2/{split}")]
