"""``rlhf-gym sft``: a model and texts or responses in; a run directory out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch

from rlhf_gym.atomic import replaced_directory, write_json
from rlhf_gym.cli.options import SFT, as_dict
from rlhf_gym.cli.setup import model_source, parse_config, quiet_transformers
from rlhf_gym.cli.train import report_stop, train_agent
from rlhf_gym.lm import generate, load_language_model, load_tokenizer, make_engine
from rlhf_gym.lm.load import max_context
from rlhf_gym.lm.scratch import new_model, train_tokenizer
from rlhf_gym.plots import plot_run
from rlhf_gym.runs import RunDirectory, machine, read_metrics
from rlhf_gym.sft import Example, Ngram, Trainer, hold_out, make_trainer, read_texts

_NUM_SAMPLES, _SAMPLE_TOKENS, _OPENING_TOKENS = 8, 64, 16
_SCRATCH_MAX_TOKENS = 256
_ORDER, _MOST_COUNTED = 4, 2_000_000  # some 10 s and 1 GB
_NGRAM = f"{_ORDER}-gram of the same tokens"
_PANELS = (("train/loss", "training loss (nats per token)"), ("eval/perplexity", "held-out perplexity"))


def run(options: SFT) -> int:
    """Train and measure; returns the exit code."""
    quiet_transformers()
    # All that can be wrong with the arguments is found before the run directory is made and before any training.
    trainer = _make_trainer(options)
    run_directory = RunDirectory(
        options.out, as_dict(options), verb="sft", overwrite=options.overwrite, resume=options.resume
    )
    if trainer.num_cut:
        print(f"{trainer.num_cut} demonstrations were longer than --max-tokens and were cut or dropped")
    evaluation = run_directory.path / "evaluation.json"
    if run_directory.has_checkpoint:
        trainer.restore(run_directory.model)
        before = json.loads(evaluation.read_text(encoding="utf-8"))["before"]
        print(f"going on from {trainer.num_timesteps} tokens", flush=True)
    else:
        if options.resume:
            print(
                f"there is no checkpoint in {run_directory.path} to go on from; starting from the beginning", flush=True
            )
        before = trainer.evaluate() if trainer.eval_examples else {}
        write_json(evaluation, {"before": before})
        run_directory.write_samples("before", sample(trainer, options.seed))

    stop = train_agent(
        trainer, run_directory, options.num_epochs, options.checkpoint_every, options.progress_bar, print_step
    )
    if stop.signal is not None and trainer.num_steps < options.num_epochs * trainer.steps_per_epoch:
        return report_stop(stop, trainer, run_directory, "; the same command with --resume goes on")

    after, ngram = (trainer.evaluate(), _baseline(trainer)) if trainer.eval_examples else ({}, {})
    run_directory.write_samples("after", sample(trainer, options.seed))
    write_json(evaluation, {"before": before, "after": after, "ngram": ngram, "epochs": trainer.history})
    if options.merge:
        merged = load_language_model(run_directory.model, device="cpu", dtype="float32")
        with replaced_directory(run_directory.path / "merged") as folder:
            merged.model.save_pretrained(folder)
            merged.tokenizer.save_pretrained(folder)
    columns = {name: found for name, found in (("before", before), ("after", after), (_NGRAM, ngram)) if found}
    metrics = read_metrics(run_directory.path / "metrics.csv")
    plot_run({"sft": metrics}, run_directory.plots / "curves.png", _PANELS)
    (run_directory.path / "README.md").write_text(model_card(options, trainer, columns), encoding="utf-8")
    for name, found in columns.items():
        print(f"held out, {name}: perplexity {found['perplexity']:.3f}, {found['bits_per_byte']:.3f} bits per byte")
    print(f"run directory: {run_directory.path}")
    return 0


def _baseline(trainer: Trainer) -> dict[str, float]:
    """What counting the same tokens gives; nothing where there are too many to count here."""
    if sum(example.num_tokens for example in trainer.examples) > _MOST_COUNTED:
        return {}
    vocab_size = trainer.model.config.get_text_config().vocab_size
    return Ngram(trainer.examples, vocab_size, order=_ORDER).evaluate(trainer.eval_examples)


def _make_trainer(options: SFT) -> Trainer:
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 3e-3 if options.scratch else 1e-3 if options.lora is not None else 1e-4
    settings = parse_config(options.config) | {"batch_size": options.batch_size, "learning_rate": learning_rate}
    share = options.eval_share if options.eval_share is not None else 0.0 if options.eval is not None else 0.1
    data: Any = options.data
    eval_data: Any = options.eval
    max_tokens, tokenizer = options.max_tokens, None
    if options.scratch is None:
        model: Any = model_source(options.model)
    else:
        max_tokens = max_tokens or _SCRATCH_MAX_TOKENS
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(model_source(options.tokenizer))
        else:
            texts = read_texts(data, None)
            if share:  # what is held out is not even counted by the tokenizer
                texts, held_out = hold_out(texts, share, options.seed)
                eval_data, share = held_out.records, 0.0
            data = texts.records
            tokenizer = train_tokenizer((record.prompt + record.completion for record in data), options.vocab_size)
        model = new_model(
            options.scratch,
            tokenizer,
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            max_tokens=max_tokens,
            seed=options.seed,
        )
    return make_trainer(
        data,
        model=model,
        tokenizer=tokenizer,
        eval_data=eval_data,
        eval_share=share,
        max_tokens=max_tokens,
        truncate=options.truncate,
        lora_rank=options.lora,
        seed=options.seed,
        device=options.device,
        **settings,
    )


def print_step(trainer: Any, metrics: Mapping[str, float]) -> None:
    """A line for every tenth step and each epoch, where no progress bar can be drawn; a callback."""
    if trainer.num_steps % 10 and "eval/loss" not in metrics:
        return
    perplexity = f", held-out perplexity {metrics['eval/perplexity']:.3f}" if "eval/perplexity" in metrics else ""
    print(
        f"{trainer.num_timesteps} tokens, epoch {metrics['train/epoch']:.2f}, loss {metrics['train/loss']:.3f}{perplexity}, "
        f"{metrics['time/fps']:.0f} tokens/s",
        flush=True,
    )


def sample(trainer: Trainer, seed: int) -> list[dict[str, str]]:
    """What the model writes after a few prompts, those held out where there are any, and what stands there.

    Of a text without a prompt the first tokens are the prompt.
    """
    examples = (trainer.eval_examples or trainer.examples)[:_NUM_SAMPLES]
    prompts = [torch.tensor(e.ids[: e.num_context if e.num_context > 1 else _opening(e)]) for e in examples]
    longest = max(map(len, prompts))
    num_tokens = min(_SAMPLE_TOKENS, (max_context(trainer.model.config) or longest + _SAMPLE_TOKENS) - longest)
    if num_tokens < 1:
        return []
    uniforms = torch.rand(len(prompts), num_tokens, generator=torch.Generator().manual_seed(seed))
    responses = generate(
        make_engine(trainer.model, len(prompts), longest + num_tokens),
        prompts,
        max_response_tokens=num_tokens,
        eos_token_ids=trainer.eos_token_ids,
        uniforms=uniforms,
    )
    rows = []
    for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        tails = {
            "response": responses.response_ids[i][responses.response_mask[i]].tolist(),
            "reference": example.ids[len(prompt) :],
        }
        # Decoded together: many tokenizers drop the space before the first word of what they decode.
        head, *wholes = (
            trainer.tokenizer.decode([*prompt.tolist(), *tail], skip_special_tokens=True)
            for tail in ([], *tails.values())
        )
        rows.append({"prompt": head} | {name: whole[len(head) :] for name, whole in zip(tails, wholes, strict=True)})
    return rows


def _opening(example: Example) -> int:
    return max(1, min(_OPENING_TOKENS, len(example.ids) // 2))


def model_card(options: SFT, trainer: Trainer, columns: Mapping[str, Mapping[str, float]]) -> str:
    """The README of a run: how the model was made, how good it is, what it must not be used for."""
    base = options.model or f"a new {options.scratch}"
    lines = ["Nothing was held out."]
    if columns:
        lines = ["| " + " | ".join(["held out", *columns]) + " |", "| --- |" + " --- |" * len(columns)]
        for name in ("loss", "perplexity", "bits_per_byte"):
            numbers = [f"{found[name]:.4f}" for found in columns.values()]
            lines.append("| " + " | ".join([name.replace("_", " "), *numbers]) + " |")
    settings = [f"- {name}: `{value}`" for name, value in as_dict(options).items() if value not in (None, (), [])]
    versions = ", ".join(f"{name} {version}" for name, version in machine()["packages"].items() if version)
    what = 'The model is in `model/` and loads with `AutoModelForCausalLM.from_pretrained("model")`'
    if options.lora is not None:
        what = "The adapter is in `model/` and loads with peft or `rlhf_gym.lm.load_language_model`"
    elif options.scratch == "lstm":
        what += ", once `rlhf_gym.lm` is imported"
    return _CARD.substitute(
        base=base,
        data=Path(options.data).name,
        num_parameters=f"{trainer.model.num_parameters():,}",
        what=what,
        table="\n".join(lines),
        num_examples=f"{len(trainer.examples):,}",
        num_tokens=f"{sum(example.num_tokens for example in trainer.examples):,}",
        num_eval=f"{len(trainer.eval_examples):,}",
        settings="\n".join(settings),
        versions=versions,
    )


_CARD = Template("""\
# $base, fine-tuned on $data

`$base` ($num_parameters parameters) after `rlhf-gym sft`. $what;
`rlhf-gym generate --model .` tries it.

## Evaluation

Learnt from $num_examples examples of $num_tokens tokens in all; measured on $num_eval others.

$table

The loss is the mean of -log p in nats per token of the response, EOS included. Samples: `samples_before.jsonl`,
`samples_after.jsonl`. Curves: `plots/curves.png`, `metrics.csv`, `tensorboard/`.

## Limits

The model imitates its data, mistakes and prejudices included. It keeps the weaknesses of what it began with, and the
licences of model and data apply.

## Settings

$settings

Made with $versions.
""")
