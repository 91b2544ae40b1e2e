"""Relearning: fine-tune on what was forgotten. An attack of one's own."""

from openunlearn_nb import Attack, attack


@attack("relearn", paper="https://arxiv.org/abs/2506.12618", learning_rate=2e-5, epochs=1, effective_batch=32)
class Relearn(Attack):
    """One epoch on the whole forget set, answer tokens only, the learning rate decaying linearly."""

    def run(self, model, data):
        from openunlearn_nb.training.pairs import TrainConfig
        from openunlearn_nb.training.trainer import train

        examples = data.benchmark.forget_examples(data.split, data.enc)
        config = TrainConfig(**self.settings(data), warmup_epochs=0, weight_decay=0, seed=data.seed)
        return train(model.float(), data.enc.tokenizer.pad_token_id, "Finetune", [], examples, config).model
