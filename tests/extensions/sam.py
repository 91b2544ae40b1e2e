"""SAM (arXiv 2502.05374): the forget gradient where the forget loss is worst nearby. `SAM(NPO)` wraps NPO."""
from openunlearn_nb import Method, method


@method("SAM", wraps=True, paper="arXiv 2502.05374", rho=0.01)
class SAM(Method):
    def gradients(self, closure, state):
        forget = closure("forget")
        with state.moved((self.s.rho / forget.norm()) * forget):
            forget = closure("forget")
        return self.combine_gradients(forget, closure("retain"), state)
