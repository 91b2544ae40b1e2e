"""A method of one function: bring each response to a loss of `target` a token."""
from openunlearn_nb import method
from openunlearn_nb.models.forwards import sequence_nll


@method("Aim", target=2.0)
def aim(model, batch, ref, s):
    nll, n = sequence_nll(model, batch["forget"])
    return ((nll / n - s.target) ** 2).mean()
