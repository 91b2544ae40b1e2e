"""Make a language model forget, and know whether it did."""
import logging

__version__ = "0.1.0"

_API = {"method": "methods.method", "Method": "methods.method", "method_loss": "methods.method",
        "METHODS": "methods.method", "UnlearnTrainer": "training.unlearn", "UnlearnConfig": "training.config",
        "evaluate": "evaluation.evaluate",
        "Evaluation": "evaluation.evaluate", "EvaluateCallback": "evaluation.callback", "metric": "evaluation.metric",
        "METRICS": "evaluation.metric", "attack": "evaluation.attacks", "Attack": "evaluation.attacks",
        "ATTACKS": "evaluation.attacks",
        "RunConfig": "experiments.config", "GridConfig": "experiments.grid", "run_grid": "experiments.grid"}

# transformers imports it unasked where it is installed, and on a CPU it complains of kernels that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str):
    "`openunlearn_nb.method_loss` and the like, imported when first asked for: `import openunlearn_nb` stays light."
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"openunlearn_nb.{_API[name]}"), name)
