"""``rlhf-gym evaluate``: how good is a model on some prompts under some reward."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlhf_gym.cli.options import Evaluate
from rlhf_gym.cli.setup import make_envs, model_source, quiet_transformers
from rlhf_gym.cli.tables import print_comparison
from rlhf_gym.evaluation import Evaluation, as_json, evaluate
from rlhf_gym.lm import load_language_model


def run(options: Evaluate) -> int:
    """Evaluate and print; returns the exit code."""
    quiet_transformers()
    policy = load_language_model(model_source(options.model), device=options.device, dtype=options.dtype)
    source = options.reference or _own_reference(options.model)
    envs = make_envs(options, num_envs=1, model=policy if source is None else model_source(source))
    model = None if source is None else policy.model
    arguments = {
        "num_episodes": options.num_episodes,
        "seed": options.seed,
        "greedy": options.greedy,
        "reference_column": options.reference_column,
        "perplexity_model": options.perplexity_model,
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
        Path(options.out).write_text("".join(lines), encoding="utf-8")
    if options.json:
        print(json.dumps(_as_json(found, columns.get("reference"))))
        return 0
    print_comparison(columns)
    print(f"{len(found.scores)} responses to {found.summary()['num_prompts']} prompts")
    if found.references is not None and "bleu" not in found.texts:
        print("BLEU and chrF need sacrebleu: pip install rlhf_gym[metrics]")
    if options.out is not None:
        print(f"samples: {options.out}")
    return 0


def _as_json(found: Evaluation, reference: Evaluation | None) -> dict[str, Any]:
    """All numbers of the table: the model's summary and, where the reference was sampled, its own and the comparison."""
    if reference is None:
        return found.summary()
    shares = {name: as_json(share) for name, share in found.against(reference).items()}
    return {**found.summary(), **shares, "reference": reference.summary()}


def _own_reference(model: str) -> str | None:
    """What a run directory's model was trained from, None when it is no run."""
    config = Path(model).expanduser() / "config.json"
    if model_source(model) == model or not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8")).get("options", {}).get("model")
