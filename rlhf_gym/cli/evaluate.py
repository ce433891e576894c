"""``rlhf-gym evaluate``: how good is a model on some prompts under some reward."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlhf_gym.atomic import write_text
from rlhf_gym.cli.files import new_file
from rlhf_gym.cli.options import Evaluate
from rlhf_gym.cli.red_team import run_red_team
from rlhf_gym.cli.saved import BestOf, acting_policy, own_reference
from rlhf_gym.cli.setup import make_envs, model_source, quiet_transformers
from rlhf_gym.cli.tables import print_comparison
from rlhf_gym.data import write_jsonl
from rlhf_gym.evaluation import Evaluation, as_json, evaluate
from rlhf_gym.lm import load_language_model
from rlhf_gym.rewards.ensemble import Ensemble, disagreement
from rlhf_gym.safety import review_queue

DISAGREEMENT = "disagreement"


def run(options: Evaluate) -> int:
    """Evaluate and print; returns the exit code."""
    for flag, name in (("--out", options.out), ("--review-queue", options.review_queue)):
        if name is not None:
            new_file(flag, name, options.overwrite)
    quiet_transformers()
    lm = load_language_model(model_source(options.model), device=options.device, dtype=options.dtype)
    policy = acting_policy(options, lm)
    source = options.reference or own_reference(options.model)
    if source is None and policy is not lm.model:
        raise ValueError(
            f"--model {options.model} holds an agent that is not its language model alone; give the directory of its run, "
            "or --reference, what it was trained from"
        )
    reference = lm if source is None else model_source(source)
    model = None if source is None else policy
    if options.red_team is not None:
        return run_red_team(options, model, reference)
    envs = make_envs(options, num_envs=1, model=reference)
    arguments = {
        "num_episodes": options.num_episodes,
        "seed": options.seed,
        "greedy": options.greedy,
        "reference_column": options.reference_column,
        "perplexity_model": options.perplexity_model,
        "others": _uncertainty(envs) if options.review_queue else None,
    }
    found = evaluate(model, envs, **arguments)
    columns = {options.model: found}
    if source is None:
        # The model stood in as its own reference; a KL of 0 would read as "it did not move".
        samples = [{name: value for name, value in sample.items() if name != "kl"} for sample in found.samples]
        columns[options.model] = found = dataclasses.replace(found, kl=None, samples=samples)
    elif options.win_rate:
        # First: the others are compared with it.
        columns = {"reference": evaluate(None, envs, **arguments), **columns}
    if options.out is not None:
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in found.samples]
        write_text(Path(options.out).expanduser(), "".join(lines))
    if options.review_queue is not None:
        _write_review_queue(options, found, columns.get("reference"))
    if options.json:
        print(json.dumps(_as_json(found, columns.get("reference"))))
        return 0
    print_comparison(columns)
    print(f"{len(found.scores)} responses to {found.summary()['num_prompts']} prompts")
    if source is None:
        print("no KL: --reference takes the model that it was trained from, and compares the two")
    if isinstance(policy, BestOf):
        print(f"{options.model}: each the best of {policy.num_candidates} by --reward")
    if found.references is not None and "bleu" not in found.texts:
        print("BLEU and chrF need sacrebleu: pip install rlhf_gym[metrics]")
    if options.out is not None:
        print(f"samples: {options.out}")
    if options.review_queue is not None:
        print(f"to be judged: rlhf-gym label --file {options.review_queue} --order-by priority")
    return 0


def _uncertainty(envs: Any) -> dict[str, Any]:
    """How far the members of an ensemble disagree, where the reward is one."""
    reward = envs.unwrapped.reward
    return {DISAGREEMENT: disagreement(reward)} if isinstance(reward, Ensemble) else {}


def _write_review_queue(options: Evaluate, found: Evaluation, reference: Evaluation | None) -> None:
    rows = review_queue(
        found.samples,
        None if reference is None else reference.samples,
        size=options.review_size,
        uncertainty=DISAGREEMENT if DISAGREEMENT in found.others else None,
    )
    sampling = {"temperature": options.temperature, "greedy": options.greedy, "seed": options.seed}
    write_jsonl(options.review_queue, [{**row, "checkpoint": options.model, "sampling": sampling} for row in rows])


def _as_json(found: Evaluation, reference: Evaluation | None) -> dict[str, Any]:
    """All numbers of the table: the model's summary and, where the reference was sampled, its own and the comparison."""
    if reference is None:
        return found.summary()
    shares = {name: as_json(share) for name, share in found.against(reference).items()}
    return {**found.summary(), **shares, "reference": reference.summary()}
