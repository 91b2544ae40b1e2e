"""Make a language model forget, and know whether it did."""

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .data.benchmark import BENCHMARKS, Benchmark, benchmark
    from .evaluation.attacks import ATTACKS, Attack, attack
    from .evaluation.callback import EvaluateCallback
    from .evaluation.evaluate import Evaluation, evaluate
    from .evaluation.metric import METRICS, metric
    from .experiments.config import RunConfig
    from .experiments.grid import run_grid
    from .experiments.grid_config import GridConfig
    from .methods.method import METHODS, Method, method, method_loss
    from .training.config import UnlearnConfig
    from .training.unlearn import UnlearnTrainer

_MODULES = {  # where each name stands: it is imported when it is first used, so that this package stays light
    "data.benchmark": ("BENCHMARKS", "Benchmark", "benchmark"),
    "evaluation.attacks": ("ATTACKS", "Attack", "attack"),
    "evaluation.callback": ("EvaluateCallback",),
    "evaluation.evaluate": ("Evaluation", "evaluate"),
    "evaluation.metric": ("METRICS", "metric"),
    "experiments.config": ("RunConfig",),
    "experiments.grid": ("run_grid",),
    "experiments.grid_config": ("GridConfig",),
    "methods.method": ("METHODS", "Method", "method", "method_loss"),
    "training.config": ("UnlearnConfig",),
    "training.unlearn": ("UnlearnTrainer",),
}

__all__ = [
    "ATTACKS",
    "BENCHMARKS",
    "METHODS",
    "METRICS",
    "Attack",
    "Benchmark",
    "EvaluateCallback",
    "Evaluation",
    "GridConfig",
    "Method",
    "RunConfig",
    "UnlearnConfig",
    "UnlearnTrainer",
    "attack",
    "benchmark",
    "evaluate",
    "method",
    "method_loss",
    "metric",
    "run_grid",
]

# transformers imports it unasked where it is installed, and on a CPU it complains of kernels that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """A name of the package, such as `openunlearn_nb.method_loss`, from the module where it stands."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
