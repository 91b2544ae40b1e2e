"""Task vector (arXiv 2212.04089): away from a model that was trained further on the forget set."""
import copy

import torch

from openunlearn_nb import Method, method
from openunlearn_nb.training.pairs import TrainConfig
from openunlearn_nb.training.trainer import train


@method("TaskVector", paper="arXiv 2212.04089", strength=5.0, learning_rate=1e-5, epochs=10)
class TaskVector(Method):
    loss = None  # nothing is trained

    def after(self, model, data):
        recipe = TrainConfig(learning_rate=self.s.learning_rate, epochs=self.s.epochs)
        reinforced = train(copy.deepcopy(model), data.pad_id, "Finetune", [], data.forget, recipe).model
        with torch.no_grad():
            for p, q in zip(model.parameters(), reinforced.parameters()):
                p -= self.s.strength * (q - p)
