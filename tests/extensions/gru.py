"""GRU (arXiv 2503.09117): no step against the retain gradient. `GRU(NPO)` wraps NPO."""
from openunlearn_nb import Method, method


@method("GRU", wraps=True, paper="arXiv 2503.09117", alpha=1.0, smoothing=0.8)
class GRU(Method):
    def combine_gradients(self, forget, retain, state):
        mean = self.s.smoothing * retain
        if "mean" in self.memory:
            mean = mean + (1 - self.s.smoothing) * self.memory["mean"]
        self.memory["mean"] = mean
        against = forget.dot(mean)
        state.log(against=against)
        return forget - (against / mean.dot(mean)) * mean if against < 0 else forget
