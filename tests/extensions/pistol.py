"""PISTOL (arXiv 2406.16810) as a benchmark of one's own: contracts between companies, one of which is forgotten.

Its rows have question, answer and edge, the pair of companies that signed the contract; a split is an edge. Scored are
ROUGE-1 and ROUGE-L recall. Mean reciprocal rank and hit rate need the rank of each true token, which rows do not have."""

from openunlearn_nb.data.benchmark import Benchmark, benchmark
from openunlearn_nb.data.sources import load_rows


@benchmark("PISTOL")
class Pistol(Benchmark):
    """One edge to forget, all others to retain."""

    splits = ()
    split_words = ("edge", "edges")
    data_help = "a folder with pistol_sample1.json (question, answer, edge)"
    metrics = {
        **{f"{side}_Prob": f"probability({side}/answer)" for side in ("forget", "retain")},
        **{f"{side}_ROUGE": f"rouge_recall({side}/generation)" for side in ("forget", "retain")},
        "exact_memorization": "exact_memorization(forget/answer)",
    }
    columns = default_metrics = shown = ("forget_ROUGE", "retain_ROUGE", "forget_Prob", "retain_Prob")
    counted, quoted = "forget_Prob", "forget_ROUGE"

    def available_splits(self):
        return list(dict.fromkeys(row["edge"] for row in load_rows(self.data, "pistol_sample1")))

    def rows(self, name):
        side, edge = name.split("/")
        return [row for row in load_rows(self.data, "pistol_sample1") if (row["edge"] == edge) == (side == "forget")]

    def data_sets(self, split):
        self.check_split(split)
        return {side: f"{side}/{split}" for side in ("forget", "retain")}

    def forget_rows(self, split):
        return self.rows(f"forget/{split}")

    def retain_rows(self, split):
        return self.rows(f"retain/{split}")
