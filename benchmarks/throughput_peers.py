"""The other side of `throughput`: runs in an environment of its own, where TRL is installed and this project is not.

    python throughput_peers.py '{"case": "trl-ppo", ...}'

Builds what the case asks for, says "ready" on a line, and then answers each line on its input by doing the work once
and printing what it took as a line of JSON. So two sides can take turns on one machine. Files go where it is started.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_answers = 1  # where answers go


def gpt2(shape: dict[str, Any], kind: str = "LMHead") -> Any:
    """A random model of the shape, on its ``device``; the same seed gives the same weights everywhere."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["max_tokens"], n_embd=shape["width"],
        n_layer=shape["layers"], n_head=shape["heads"], bos_token_id=None, eos_token_id=None, pad_token_id=0,
        activation_function=shape.get("activation", "gelu_new"),
    )  # fmt: skip
    torch.manual_seed(0)
    config.num_labels = 1
    made = transformers.GPT2LMHeadModel if kind == "LMHead" else transformers.GPT2ForSequenceClassification
    return made(config).to(shape.get("device", "cpu"))


def tokenizer(vocab_size: int) -> Any:
    """Words w2, w3, ...: the ids are all that matters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def prompts(case: dict[str, Any], number: int) -> Any:
    """Random prompts of the case, (number, prompt_tokens) int64; the same on both sides."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, case["shape"]["vocab_size"], (number, case["prompt_tokens"]), generator=generator)


def text_lengths(completions: list[str], **_: Any) -> list[float]:
    """The reward of GRPO and RLOO on both sides: the number of characters."""
    return [float(len(text)) for text in completions]


def now() -> float:
    """Seconds of a clock, once a GPU in use has done all that it was asked for."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Phases:
    """Seconds that parts of the work take, measured around the functions that do them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last: tuple[str, float] | None = None

    def time(self, owner: Any, attribute: str, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        """From now on calls of ``owner.attribute`` count as ``name``, those whose arguments ``when`` accepts."""
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = now()
            found = function(*arguments, **named)
            if when(*arguments):
                self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
            return found

        setattr(owner, attribute, timed)

    def time_from(self, owner: Any, attribute: str, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        """From the first call of ``owner.attribute`` all time up to `take` counts as ``name``."""
        function = getattr(owner, attribute)

        def marked(*arguments: Any, **named: Any) -> Any:
            if self._last is None and when(*arguments):
                self._last = (name, now())
            return function(*arguments, **named)

        setattr(owner, attribute, marked)

    def take(self) -> dict[str, float]:
        """The seconds since the last time that they were taken."""
        found, self.seconds = self.seconds, {}
        if self._last is not None:
            found[self._last[0]] = now() - self._last[1]
            self._last = None
        return found


def trl_ppo(case: dict[str, Any]) -> None:
    """TRL's PPOTrainer as it ships: policy, reference, value and reward model."""
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    shape, rows = case["shape"], case["rows"]
    asked = prompts(case, 4 * rows)
    dtype = getattr(torch, case.get("weights", "float32"))
    policy, reference, value, reward = (gpt2(shape, kind).to(dtype) for kind in ("LMHead", "LMHead", "score", "score"))
    settings = PPOConfig(
        num_mini_batches=1, num_ppo_epochs=case["epochs"], response_length=case["response_tokens"],
        total_episodes=10_000 * rows, local_rollout_forward_batch_size=rows, num_sample_generations=0, kl_coef=0.05,
        stop_token=None, **_trainer_settings(case),
    )  # fmt: skip
    phases = Phases()
    phases.time(ppo_trainer, "batch_generation", "decode")
    phases.time(ppo_trainer, "forward", "reference", when=lambda model, *_: model is reference)
    phases.time(ppo_trainer, "get_reward", "reward", when=lambda model, *_: model is reward)
    phases.time_from(ppo_trainer, "forward", "update", when=lambda model, *_: model is not reference)
    PPOTrainer(
        args=settings, processing_class=tokenizer(shape["vocab_size"]), model=policy, ref_model=reference,
        value_model=value, reward_model=reward,
        train_dataset=Dataset.from_dict({"input_ids": asked.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": asked[:rows].tolist()}), callbacks=[_turns(case, phases)],
    ).train()  # fmt: skip


def trl_groups(case: dict[str, Any]) -> None:
    """TRL's GRPOTrainer or RLOOTrainer: one optimiser step on new responses, with a reference, without dropout."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import GPT2LMHeadModel

    name = case["case"].removeprefix("trl-").upper()
    dtype = getattr(torch, case.get("weights", "float32"))
    # The trainer loads the reference from where the model is from.
    gpt2(case["shape"]).save_pretrained("model")
    settings = getattr(trl, f"{name}Config")(
        num_generations=case["group_size"], max_completion_length=case["response_tokens"], beta=0.05, max_steps=10_000,
        num_iterations=case["epochs"], disable_dropout=True, gradient_checkpointing=bool(case.get("gradient_checkpointing")),
        **({"loss_type": "grpo"} if name == "GRPO" else {}), **_trainer_settings(case),
    )  # fmt: skip
    phases = Phases()
    texts = [" ".join(f"w{i}" for i in row) for row in prompts(case, 4 * case["rows"]).tolist()]
    trainer = getattr(trl, f"{name}Trainer")(
        args=settings, processing_class=tokenizer(case["shape"]["vocab_size"]), reward_funcs=text_lengths,
        model=GPT2LMHeadModel.from_pretrained("model", dtype=dtype), train_dataset=Dataset.from_dict({"prompt": texts}),
        callbacks=[_turns(case, phases)],
    )  # fmt: skip
    phases.time(trainer, "_generate", "decode")
    phases.time(
        trainer, "_get_per_token_logps_and_entropies", "reference", when=lambda model, *_: model is trainer.ref_model
    )
    phases.time(trainer, "_calculate_rewards", "reward")
    phases.time_from(trainer, "compute_loss", "update")
    trainer.train()


def _trainer_settings(case: dict[str, Any]) -> dict[str, Any]:
    """What TRL's trainers are told alike: the batch as one, and nothing but the training."""

    return {
        "output_dir": ".", "per_device_train_batch_size": case["rows"], "gradient_accumulation_steps": 1,
        "learning_rate": 1e-6, "bf16": bool(case.get("bf16")), "use_cpu": case["shape"].get("device", "cpu") == "cpu",
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def _turns(case: dict[str, Any], phases: Phases) -> Any:
    """A callback that lets a trainer take one step for each line that comes."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        started = 0.0

        def wait(self) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.started = now()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            say("ready")
            self.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lengths = [case["response_tokens"]] * case["rows"]
            tell(now() - self.started, lengths=lengths, phases=phases.take())
            self.wait()

    return Turns()


def generate(case: dict[str, Any]) -> None:
    """``model.generate`` by sampling: tokens only. With ``mean_tokens`` responses end at geometric lengths."""
    import torch
    from transformers import GenerationConfig

    shape, rows, limit = case["shape"], case["rows"], case["response_tokens"]
    model = gpt2(shape).to(getattr(torch, case.get("weights", "float32"))).eval()
    asked = prompts(case, case.get("prompts", rows))
    more: dict[str, Any] = {}
    eos = torch.tensor(eos_token_ids(case), dtype=torch.long)
    if len(eos):
        more = {"eos_token_id": eos.tolist()}
    config = GenerationConfig(max_new_tokens=limit, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, **more)

    def work() -> dict[str, Any]:
        lengths: list[int] = []
        for batch in asked.to(model.device).split(rows):
            with torch.inference_mode():
                out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=config)
            new = out[:, batch.shape[1] :]
            ended = torch.isin(new, eos.to(new)).cumsum(1).cumsum(1) > 1  # what stands after the first end
            lengths += (~ended).sum(1).tolist()
        return {"lengths": lengths}

    answer(work)


def eos_token_ids(case: dict[str, Any]) -> list[int]:
    """So many tokens end a response that one in ``mean_tokens`` does: a random model finds all about equally likely."""
    return list(range(case["shape"]["vocab_size"] // case["mean_tokens"])) if case.get("mean_tokens") else []


def answer(work: Callable[[], dict[str, Any]]) -> None:
    """Does the work once for each line that comes."""
    say("ready")
    while sys.stdin.readline():
        start = now()
        found = work()
        tell(now() - start, **found)


def tell(seconds: float, **more: Any) -> None:
    """One measurement, with the most memory that the process has held so far.

    Args:
        seconds: What the work took.
        more: ``lengths``, the tokens of each response, and ``phases``, where there are any.
    """
    say(json.dumps({"seconds": seconds, "memory_mib": peak_memory_mib(), **more}))


def peak_memory_mib() -> float:
    """Of a GPU in use what its tensors took; otherwise what Linux calls the high-water mark; elsewhere getrusage's, which
    on Linux would begin with the parent's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(text: str) -> None:
    os.write(_answers, (text + "\n").encode())


CASES = {"trl-ppo": trl_ppo, "trl-grpo": trl_groups, "trl-rloo": trl_groups, "generate": generate}


def take_answers() -> None:
    """Keeps the output for `say`: what libraries print must not get among the answers."""
    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)


if __name__ == "__main__":
    take_answers()
    chosen = json.loads(sys.argv[1])
    if chosen.get("keep_freed_memory"):  # as rlhf_gym.memory does it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**31 - 1)
        mallopt(-1, 2**31 - 1)
    import torch as _torch

    _torch.set_num_threads(chosen["threads"])
    CASES[chosen["case"]](chosen)
