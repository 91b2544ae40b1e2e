"""OpenUnlearning's own evaluation of TOFU against the package's: same model, data and metrics, each turn in processes of their own.

    git clone https://github.com/locuslab/open-unlearning REF && pip install hydra-core hydra_colorlog
    python benchmarks/reference.py --reference REF --data TOFU --output benchmarks/records/reference.json   # minutes

The model is the embedded one, fine-tuned on TOFU. Seconds are those of the evaluation, tokenising and metrics included, without
loading the model. The reference code is run as it is; two things are set so that it runs on a CPU under transformers 5: the device,
and that a chat template returns a list of ids, as it did in transformers 4.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from speed import distance, in_fresh_process, model_folder

METRICS = ["forget_truth_ratio", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility", "privleak", "extraction_strength"]  # its default


def reference_child(args, model: str) -> dict:
    """Seconds, peak memory and summary of the reference code's evaluation."""
    sys.path.insert(0, f"{args.reference}/src")
    from functools import partialmethod

    from hydra import compose, initialize_config_dir
    from transformers import PreTrainedTokenizerBase

    template = PreTrainedTokenizerBase.apply_chat_template
    PreTrainedTokenizerBase.apply_chat_template = partialmethod(template, return_dict=False)
    from evals import get_evaluators
    from model import get_model
    from trainer.utils import seed_everything

    from openunlearn_nb.evaluation.records import peak_memory

    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(f"{args.reference}/configs", version_base=None):
        data = Path(folder) / "locuslab/TOFU"
        if Path(args.data).is_dir():  # `load_dataset` prefers a folder of the id's name
            data.parent.mkdir()
            data.symlink_to(Path(args.data).resolve())
            os.chdir(folder)
        config = compose("eval.yaml", overrides=[
            "experiment=eval/tofu/default.yaml", "task_name=speed", f"paths.output_dir={folder}/out", f"forget_split={args.split}",
            f"holdout_split=holdout{args.split.removeprefix('forget')}", f"model.model_args.pretrained_model_name_or_path={model}",
            f"model.tokenizer_args.pretrained_model_name_or_path={model}", "model.model_args.attn_implementation=sdpa",
            "model.model_args.torch_dtype=float32", "model.model_args.device_map=cpu", "++model.template_args.system_prompt=null",
            "++model.template_args.system_prompt_with_special_tokens=null"])
        seed_everything(config.seed)
        loaded, tokenizer = get_model(config.model)
        begin = time.perf_counter()
        for evaluator in get_evaluators(config.eval).values():
            evaluator.evaluate(template_args=config.model.template_args, model=loaded, tokenizer=tokenizer)
        seconds = time.perf_counter() - begin
        summary = json.loads((Path(folder) / "out/TOFU_SUMMARY.json").read_text(encoding="utf-8"))
        os.chdir("/")
    return {"seconds": seconds, "memory": peak_memory()["host"], "numbers": {name: summary[name] for name in METRICS}}


def ours_child(args, model: str) -> dict:
    """Seconds, peak memory and summary of this package's evaluation."""
    from openunlearn_nb.data.encoding import Encoder
    from openunlearn_nb.data.prompts import prompt_format
    from openunlearn_nb.data.tofu import Tofu
    from openunlearn_nb.evaluation.evaluate import evaluate
    from openunlearn_nb.evaluation.records import peak_memory
    from openunlearn_nb.models.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    loaded, enc = load_model(model), Encoder(tokenizer, prompt_format(None, tokenizer), 512, 4096)
    begin = time.perf_counter()
    summary = evaluate(loaded, enc, Tofu(args.data), args.split, metrics=METRICS).summary
    return {"seconds": time.perf_counter() - begin, "memory": peak_memory()["host"], "numbers": {name: summary[name] for name in METRICS}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reference", required=True, help="a clone of OpenUnlearning")
    p.add_argument("--data", default="locuslab/TOFU")
    p.add_argument("--split", default="forget10")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--output", required=True, help="file of the record")
    p.add_argument("--child", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    args = p.parse_args()
    args.reference = str(Path(args.reference).resolve())
    if not Path(args.reference, "src/evals").is_dir():
        sys.exit(f"{args.reference} is no clone of OpenUnlearning: it has no folder src/evals.")
    if find_spec("hydra") is None:
        sys.exit("OpenUnlearning needs hydra: pip install hydra-core hydra_colorlog")
    if args.child:
        way, model = args.child
        found = {"reference": reference_child, "ours": ours_child}[way](args, model)
        print()
        print(json.dumps(found))
        return
    from openunlearn_nb.evaluation.records import run_record
    from openunlearn_nb.internals.files import write_json

    started, turns, model = time.time(), [], model_folder("embedded", args)
    commit = subprocess.run(["git", "-C", args.reference, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for turn in range(args.repeats):
        words = ["--reference", args.reference, "--data", args.data, "--split", args.split, "--output", args.output]
        both = {way: in_fresh_process(__file__, [*words, "--child", way, model], args.threads)
                for way in ("reference", "ours")[::1 if turn % 2 else -1]}
        turns.append({"distance": distance(both["reference"]["numbers"], both["ours"]["numbers"]), **both})
        print(f"{both['reference']['seconds']:.1f} s and {both['ours']['seconds']:.1f} s, numbers within {turns[-1]['distance']:.0e}")
        write_json(args.output, run_record(started, benchmark="reference", threads=args.threads, split=args.split, reference=commit, turns=turns))
    print("Record:", args.output)


if __name__ == "__main__":
    main()
