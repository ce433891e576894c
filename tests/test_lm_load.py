"""Loading: what is found, what is refused, and what the refusals say."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lm_models import FAMILIES, V, new_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_gym.lm import LSTMForCausalLM, disable_dropout, load_language_model, make_engine
from rlhf_gym.lm.load import _HUB_TIMEOUT_S

STORIES = Path(__file__).parents[1].parent / "shared/assets/models/stories260K"


def new_tokenizer(size=V, **special):
    tokens = {f"t{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="t1")), **special)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    new_model("llama").save_pretrained(folder)
    new_tokenizer(eos_token="t2", pad_token="t3").save_pretrained(folder)
    return folder


def test_a_directory(saved):
    loaded = load_language_model(saved)
    assert loaded.vocab_size == V and loaded.max_context == 40 and loaded.name == str(saved)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.decode([4]) == "t4"
    assert load_language_model(loaded) is loaded
    assert copy.deepcopy(loaded) is loaded and copy.copy(loaded) is loaded
    assert load_language_model(str(saved), dtype="bfloat16").dtype == torch.bfloat16


def test_an_object_is_used_as_it_is():
    net = new_model("gpt2").bfloat16().train()
    loaded = load_language_model(net, new_tokenizer(eos_token="t2"))
    assert loaded.model is net and loaded.dtype == torch.bfloat16 and not net.training
    assert load_language_model(net, new_tokenizer(), dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="tokenizer must be given with a GPT2LMHeadModel object"):
        load_language_model(net)
    with pytest.raises(TypeError, match="causal language model of transformers, got a Linear"):
        load_language_model(torch.nn.Linear(2, 2), new_tokenizer())


def test_an_object_from_a_directory_brings_its_tokenizer(saved):
    net = AutoModelForCausalLM.from_pretrained(saved)
    assert load_language_model(net).tokenizer.decode([4]) == "t4"


def test_special_tokens():
    net = new_model("gpt2")
    cases = [  # the model's generation_config, the tokenizer, what comes out: eos, pad, bos
        ({"eos_token_id": [7, 2]}, {"eos_token": "t3", "pad_token": "t4", "bos_token": "t5"}, ((7, 2), 4, 5)),
        ({"eos_token_id": None}, {"eos_token": "t3"}, ((3,), 3, None)),  # no pad token: EOS serves
        (
            {"eos_token_id": 50256, "bos_token_id": 50256},
            {"eos_token": "t3"},
            ((3,), 3, None),
        ),  # ids beyond V do not count
    ]
    for config, special, expected in cases:
        net.generation_config.update(**({"bos_token_id": None} | config))
        loaded = load_language_model(net, new_tokenizer(**special))
        assert (loaded.eos_token_ids, loaded.pad_token_id, loaded.bos_token_id) == expected


def test_no_end_of_text_is_refused():
    net = new_model("gpt2")
    net.config.eos_token_id = net.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no token that ends a text: set generation_config.eos_token_id"):
        load_language_model(net, new_tokenizer())


def test_a_tokenizer_that_does_not_fit_is_refused(saved):
    with pytest.raises(ValueError, match=f"it has the id {V}, but the model's vocabulary is {V}"):
        load_language_model(saved, new_tokenizer(V + 1, eos_token="t2"))
    assert load_language_model(saved, new_tokenizer(V - 5, eos_token="t2")).vocab_size == V  # fewer tokens are fine


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", r"model='./nowhere': there is no such directory \(the working directory is "),
        ("a/b/c", "there is no such directory"),
        ("nowhere/x.gguf", "there is no such file"),
        ("two words", "no id that the Hugging Face hub could have"),
        ("tiny-revews", "did you mean 'tiny-reviews'?.*HF_HUB_OFFLINE forbids"),
        ("somebody/something", "there is 'tiny-reviews'.*not in the local cache"),
    ],
)
def test_names_that_are_nothing(name, words):
    with pytest.raises(ValueError, match=words):
        load_language_model(name)
    if "reviews" not in name and "revews" not in name:
        with pytest.raises(ValueError, match="^tokenizer="):
            load_language_model(new_model("gpt2"), name)


def test_directories_and_files_that_are_no_model(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        load_language_model(tmp_path)
    with pytest.raises(ValueError, match="is a file: give the directory"):
        load_language_model(saved / "model.safetensors")
    with pytest.raises(ValueError, match="tokenizer: none can be loaded from"):
        load_language_model(saved, tmp_path)
    with pytest.raises(ValueError, match="dtype must be 'auto'"):
        load_language_model(saved, dtype="int8")


def test_pickled_weights_are_refused(tmp_path):
    net = new_model("gpt2")
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="with safetensors weights and without code of its own"):
        load_language_model(tmp_path, new_tokenizer(eos_token="t2"))


def test_an_unreachable_hub_does_not_hang(monkeypatch):
    import huggingface_hub

    class Silent:
        def head(self, url, timeout):
            time.sleep(60)  # as a name server that never answers

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Silent)
    monkeypatch.setattr("rlhf_gym.lm.load._HUB_TIMEOUT_S", 0.2)
    assert _HUB_TIMEOUT_S <= 5
    start = time.monotonic()
    with pytest.raises(ValueError, match="https://huggingface.co cannot be reached"):
        load_language_model("gpt2")
    assert time.monotonic() - start < 2


def test_a_downloaded_model_is_loaded_while_the_hub_is_out_of_reach(monkeypatch, saved, tmp_path):
    """The hub's cache, built by hand: refs/main names the snapshot."""
    commit = "0" * 40
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "models--somebody--something" / "refs").mkdir()
    (tmp_path / "models--somebody--something" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_language_model("somebody/something")
    assert loaded.vocab_size == V and loaded.tokenizer.decode([4]) == "t4"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not here")
def test_a_real_model():
    """Its card says: BOS also separates stories, so its generation_config stops at 1 or 2; <unk> serves as padding."""
    stories = load_language_model(STORIES)
    found = (stories.vocab_size, stories.eos_token_ids, stories.pad_token_id, stories.bos_token_id, stories.max_context)
    assert found == (512, (1, 2), 0, 1, 512)


def test_an_lstm_is_saved_and_loaded_like_any_other(tmp_path):
    net = new_model("lstm")
    net.save_pretrained(tmp_path)
    new_tokenizer(eos_token="t2").save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LSTMForCausalLM
    assert torch.equal(again.eval()(input_ids=ids).logits, net(input_ids=ids).logits)
    loaded = load_language_model(tmp_path)
    assert loaded.max_context is None
    logits = make_engine(loaded, 1, 5).prefill(torch.tensor([0]), ids, torch.tensor([3]))
    torch.testing.assert_close(logits, net(input_ids=ids).logits[:, -1].detach())


def test_an_lstm_continues_from_its_state_and_ignores_padding():
    net = new_model("lstm")
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        state = net(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        found = net(input_ids=torch.tensor([[7], [7]]), past_key_values=state).logits[:, 0]
        for b, row in enumerate(([1, 2, 3, 4, 7], [5, 6, 7])):
            torch.testing.assert_close(found[b], net(input_ids=torch.tensor([row])).logits[0, -1])
        loss = net(input_ids=ids, labels=torch.where(mask.bool(), ids, -100)).loss
        logprobs = net(input_ids=ids).logits.log_softmax(-1)
    expected = -torch.stack([logprobs[0, 0, 2], logprobs[0, 1, 3], logprobs[0, 2, 4], logprobs[1, 0, 6]]).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3-mixed"])
def test_disable_dropout(family):
    name = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    model_class, config_class, shape = FAMILIES[family]
    net = model_class(config_class(**shape, **{name: 0.5})).train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        assert not torch.equal(net(input_ids=ids).logits, net(input_ids=ids).logits)
        disable_dropout(net)
        torch.testing.assert_close(net(input_ids=ids).logits, net.eval()(input_ids=ids).logits)


def test_a_loaded_model_is_not_asked_to_be_another(saved):
    loaded = load_language_model(saved, device="cpu", dtype="float32")
    again = load_language_model(loaded, new_tokenizer(), device="cpu", dtype=torch.float32)  # nothing new
    assert again is loaded and load_language_model(loaded, str(saved)) is loaded
    for arguments, says in (
        ({"dtype": "bfloat16"}, "dtype='bfloat16', but the LanguageModel"),
        ({"device": "meta"}, "device='meta', but the LanguageModel"),
        ({"tokenizer": new_tokenizer(size=5)}, "tokenizer must not be given with the LanguageModel"),
    ):
        with pytest.raises(ValueError, match=says):
            load_language_model(loaded, **arguments)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cpu:x"])
def test_a_device_that_cannot_be_used_is_named(saved, device):
    for model in (saved, new_model("gpt2"), load_language_model(saved)):
        with pytest.raises(ValueError, match=f"device must be 'auto' or one that torch can use here, got '{device}'"):
            load_language_model(model, new_tokenizer(eos_token="t2"), device=device)


def test_loading_brings_the_modules_of_known_types_only_when_needed(tmp_path, saved):
    table = {"": {"a": 0.5, "<eos>": 0.5}}
    code = """
import sys
from rlhf_gym.lm import load_language_model
load_language_model(sys.argv[1])
assert not any(name.startswith("rlhf_gym.exact") for name in sys.modules)
assert type(load_language_model(sys.argv[2]).model).__name__ == "NgramForCausalLM"
"""
    from rlhf_gym.exact import ngram_from_table

    made = ngram_from_table(table, eos="<eos>")
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
