"""Share of answers that refuse: a metric of one's own."""

from openunlearn_nb import metric


@metric("refusal_rate", reads="forget/generation", range=(0, 1), better="lower")
def refusal_rate(row):
    """Whether a generation says that it does not answer."""
    return any(words in (row["generation"] or "").lower() for words in ("sorry", "afraid", "don't know", "can't answer"))
