"""The other side of `throughput`: runs in an environment of its own, where TRL is installed and this project is not.

    python throughput_peers.py '{"case": "trl-ppo", ...}'

Builds what the case asks for, says "ready" on a line, and then answers each line on its input by doing the work once
and printing what it took as a line of JSON. So two sides can take turns on one machine.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_answers = 1  # where answers go


def gpt2(shape: dict[str, Any], kind: str = "LMHead") -> Any:
    """A random model of the shape; the same seed gives the same weights everywhere."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["max_tokens"], n_embd=shape["width"],
        n_layer=shape["layers"], n_head=shape["heads"], bos_token_id=None, eos_token_id=None, pad_token_id=0,
        activation_function=shape.get("activation", "gelu_new"),
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "LMHead":
        return transformers.GPT2LMHeadModel(config)
    config.num_labels = 1
    return transformers.GPT2ForSequenceClassification(config)


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


def trl_ppo(case: dict[str, Any]) -> None:
    """TRL's PPOTrainer as it ships: policy, reference, value and reward model; it answers from a callback."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape, rows = case["shape"], case["rows"]
    asked = prompts(case, 4 * rows)
    dtype = getattr(torch, case.get("weights", "float32"))
    models = [
        gpt2(shape).to(dtype),
        gpt2(shape).to(dtype),
        gpt2(shape, "score").to(dtype),
        gpt2(shape, "score").to(dtype),
    ]
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=case["epochs"], response_length=case["response_tokens"],
        total_episodes=10_000 * rows, local_rollout_forward_batch_size=rows, report_to=[], num_sample_generations=0,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=bool(case.get("bf16")), use_cpu=not torch.cuda.is_available(),
        learning_rate=1e-6, kl_coef=0.05, stop_token=None,
    )  # fmt: skip

    class Turns(TrainerCallback):
        started = 0.0

        def wait(self) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.started = time.perf_counter()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            say("ready")
            self.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            tell(time.perf_counter() - self.started, tokens=rows * case["response_tokens"])
            self.wait()

    PPOTrainer(
        args=settings, processing_class=tokenizer(shape["vocab_size"]), model=models[0], ref_model=models[1],
        value_model=models[2], reward_model=models[3],
        train_dataset=Dataset.from_dict({"input_ids": asked.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": asked[:rows].tolist()}), callbacks=[Turns()],
    ).train()  # fmt: skip


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

    def work() -> int:
        useful = 0
        for batch in asked.split(rows):
            with torch.inference_mode():
                out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=config)
            new = out[:, batch.shape[1] :]
            ended = torch.isin(new, eos).cumsum(1).cumsum(1) > 1  # what stands after the first end
            useful += int((~ended).sum())
        return useful

    answer(work)


def eos_token_ids(case: dict[str, Any]) -> list[int]:
    """So many tokens end a response that one in ``mean_tokens`` does: a random model finds all about equally likely."""
    return list(range(case["shape"]["vocab_size"] // case["mean_tokens"])) if case.get("mean_tokens") else []


def answer(work: Any) -> None:
    """Does the work once for each line that comes."""
    say("ready")
    while sys.stdin.readline():
        start = time.perf_counter()
        tokens = work()
        tell(time.perf_counter() - start, tokens=tokens)


def tell(seconds: float, **more: Any) -> None:
    """One measurement, with the most memory that the process has held so far."""
    say(json.dumps({"seconds": seconds, "memory_mib": peak_memory_mib(), **more}))


def peak_memory_mib() -> float:
    """What Linux calls the high-water mark; elsewhere getrusage's, which on Linux would begin with the parent's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def say(text: str) -> None:
    os.write(_answers, (text + "\n").encode())


CASES = {"trl-ppo": trl_ppo, "generate": generate}


def take_answers() -> None:
    """Keeps the output for `say`: what libraries print must not get among the answers."""
    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)


if __name__ == "__main__":
    take_answers()
    chosen = json.loads(sys.argv[1])
    import torch as _torch

    _torch.set_num_threads(chosen["threads"])
    CASES[chosen["case"]](chosen)
