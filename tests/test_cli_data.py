"""``rlhf-gym data`` from outside: what it prints, writes and refuses, with its exit codes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
from worlds import tokenizer

from rlhf_gym.cli import main
from rlhf_gym.data import Preference, load_records, read_jsonl
from rlhf_gym.data.split import prompt_key

HARMLESS = Path(__file__).parents[1].parent / "shared/assets/data/hh_rlhf_harmless/test.jsonl"

PAIR = '{"prompt": "The sky is", "chosen": " blue.", "rejected": " dark green."}'
OTHER = '{"rejected": "no",   "prompt": "Is it?",\t"chosen": "y\\u0065s"}'
LONG = "one of the ten words here will become some other"
GOOD = [
    PAIR,
    OTHER,
    PAIR.replace("sky", "  sky"),  # 3: the same
    json.dumps({"prompt": LONG, "chosen": "a", "rejected": "b"}),
    json.dumps({"prompt": LONG.replace("other", "thing"), "chosen": "a", "rejected": "b"}),  # 5: nearly
    '{"prompt": "c", "chosen": "d", "rejected": "d"}',  # 6: no choice
]
BROKEN = ['{"prompt": "c", "chosen": NaN, "rejected": "d"}', '{"prompt": "c", "chosen": "d"}']


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory with a file without problems, good.jsonl, and one with two, bad.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("good.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(GOOD).encode() + b"\r\n")
    Path("bad.jsonl").write_text("\n".join([*GOOD[:2], *BROKEN]) + "\n")
    return tmp_path


def data(*arguments):
    return main(["data", *arguments])


def one_line(capsys):
    """The only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rlhf-gym: "), lines
    return lines[0]


def table(text):
    """The two columns of a printed table."""
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


def test_check(capsys):
    assert data("check", "good.jsonl") == 0
    assert table(capsys.readouterr().out) == {
        "format": "preference (standard)",
        "rows": "6",
        "problems": "0",
        "different prompts": "5",
        "prompt, words": "median 3, mean 4.8, 95 % up to 10, longest 10",
        "chosen, words": "median 1, mean 1.0, 95 % up to 1, longest 1",
        "rejected, words": "median 1, mean 1.3, 95 % up to 2, longest 2",
        "duplicates": "1 exact, 1 near, 1 same response twice",
        "chosen is longer": "0.0%",  # of one prompt, in two rows; the others are equally long
        "chosen - rejected, words": "-0.20 [-0.76, 0.36]",  # -1, 0, 0, 0, 0: t(.975, 4) * .2 = .56
    }


def test_check_finds_problems(capsys):
    assert data("check", "bad.jsonl", "--max-problems", "1") == 1
    out = capsys.readouterr().out
    assert table(out)["rows"] == "2" and table(out)["problems"] == "2"
    assert out.splitlines()[-2:] == [
        "bad.jsonl, line 3, column 27: NaN is no JSON; write null, or leave the key out",
        "and 1 more problems",
    ]
    assert data("check", "--json", "bad.jsonl", "--no-near") == 1
    found = json.loads(capsys.readouterr().out)
    assert [(p["line"], p["column"]) for p in found["problems"]] == [(3, 27), (4, 1)] and found["num_problems"] == 2
    assert found["format"] == {"name": "preference", "conversational": False} and found["rows"] == 2
    assert found["chosen_longer"]["mean"] == 0 and found["lengths"]["chosen"]["maximum"] == 1

    Path("none.jsonl").write_text('{"question": "\\u001b[2J\\u202e"}\n[3]\n')
    assert data("check", "none.jsonl") == 1
    out = capsys.readouterr().out
    assert table(out) == {"format": "none", "rows": "0", "problems": "2"}
    Path("keys.jsonl").write_text('{"\\u001b[2J": 1}\n')
    assert data("check", "keys.jsonl") == 1
    assert "\x1b" not in capsys.readouterr().out  # what is quoted drives no terminal


def test_check_by_tokens(capsys):
    """Words between spaces are this tokenizer's tokens; its template adds what stands in pointed brackets."""
    words = copy.deepcopy(tokenizer())
    words.save_pretrained("plain")
    words.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    words.save_pretrained("chat")
    assert data("check", "good.jsonl", "--tokenizer", "plain") == 0
    assert table(capsys.readouterr().out)["rejected, tokens"] == "median 1, mean 1.3, 95 % up to 2, longest 2"
    ask, answer = {"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e"}
    Path("talk.jsonl").write_text(json.dumps({"prompt": [ask], "completion": [answer]}) + "\n")
    assert data("check", "talk.jsonl", "--tokenizer", "chat") == 0
    found = table(capsys.readouterr().out)
    assert found["format"] == "prompt-completion (conversational)"
    # "user a b c assistant", and " d e "
    assert found["prompt, tokens"].startswith("median 5,") and found["completion, tokens"].startswith("median 2,")
    assert data("check", "talk.jsonl", "--tokenizer", "plain") == 2
    assert "--tokenizer plain: tokenizer must have a chat template" in one_line(capsys)
    assert data("check", "talk.jsonl") == 0  # "user: a b c"
    assert table(capsys.readouterr().out)["prompt, words"].startswith("median 4,")


def test_clean(capsys):
    before = Path("good.jsonl").read_bytes()
    assert data("clean", "good.jsonl", "--out", "clean.jsonl", "--dropped", "dropped.jsonl") == 0
    assert Path("clean.jsonl").read_bytes().decode() == "".join(GOOD[i] + "\n" for i in (0, 1, 3))  # unchanged lines
    assert Path("good.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == [
        "line 3: the same as line 1",
        "line 5: nearly the same as line 4 (similarity 0.80)",
        "line 6: its two responses are the same",
    ]
    assert table(out) == {
        "rows read": "6",
        "dropped: duplicate, exact": "1",
        "dropped: duplicate, near": "1",
        "dropped: same response twice": "1",
        "rows written": "3",
    }
    dropped, problems = read_jsonl("dropped.jsonl")
    assert not problems.total
    assert [(row.value["line"], row.value["reason"], row.value["of_line"]) for row in dropped] == [
        (3, "exact", 1),
        (5, "near", 4),
        (6, "same response twice", 6),
    ]
    assert dropped[1].value["similarity"] == 0.8 and dropped[1].value["row"] == json.loads(GOOD[4])
    assert data("clean", "good.jsonl", "--out", "exact.jsonl", "--no-near", "--max-problems", "1") == 0
    assert len(Path("exact.jsonl").read_text().splitlines()) == 4
    assert "and 1 more duplicates" in capsys.readouterr().out
    assert data("clean", "clean.jsonl", "--out", "again.jsonl") == 0
    assert Path("again.jsonl").read_bytes() == Path("clean.jsonl").read_bytes()


def test_clean_with_problems(capsys):
    assert data("clean", "bad.jsonl", "--out", "clean.jsonl") == 1
    out = capsys.readouterr().out
    assert not Path("clean.jsonl").exists() and "nothing was written" in out and "line 4, column 1" in out
    assert data("clean", "bad.jsonl", "--out", "clean.jsonl", "--drop-problems", "--dropped", "dropped.jsonl") == 0
    assert Path("clean.jsonl").read_text() == "".join(line + "\n" for line in GOOD[:2])
    assert table(capsys.readouterr().out)["dropped: with problems"] == "2"
    dropped = [row.value for row in read_jsonl("dropped.jsonl")[0]]
    assert [(row["line"], row["text"]) for row in dropped] == [(3, BROKEN[0]), (4, BROKEN[1])]
    # With the input replaced, what was dropped is nowhere else, what was no text included.
    Path("mine.jsonl").write_bytes(f"{GOOD[0]}\r\n".encode() + b"caf\xe9\r\n")
    arguments = ("--out", "mine.jsonl", "--dropped", "dropped.jsonl", "--drop-problems", "--overwrite")
    assert data("clean", "mine.jsonl", *arguments) == 0
    assert [row.value["text"] for row in read_jsonl("dropped.jsonl")[0]] == ["caf\\xe9"]
    Path("worse.jsonl").write_text("\n".join(BROKEN))
    assert data("clean", "worse.jsonl", "--out", "x.jsonl", "--drop-problems") == 2
    assert "no row is left" in one_line(capsys) and not Path("x.jsonl").exists()


def test_the_input_is_never_overwritten_unless_told(capsys):
    before = Path("good.jsonl").read_bytes()
    os.link("good.jsonl", "hard.jsonl")
    Path("soft.jsonl").symlink_to("good.jsonl")
    for name in ("good.jsonl", "./good.jsonl", "hard.jsonl", "soft.jsonl"):
        assert data("clean", "good.jsonl", "--out", name) == 2
        assert f"--out {name} is the input" in one_line(capsys)
    Path("other.jsonl").write_text("mine")
    for flag in ("--out", "--dropped"):
        assert data("clean", "good.jsonl", "--out", "new.jsonl", flag, "other.jsonl") == 2
        assert f"{flag} other.jsonl exists; choose another name" in one_line(capsys)
    assert Path("good.jsonl").read_bytes() == before and Path("other.jsonl").read_text() == "mine"
    assert not Path("new.jsonl").exists()
    assert data("clean", "good.jsonl", "--out", "good.jsonl", "--overwrite") == 0
    assert len(read_jsonl("good.jsonl")[0]) == 3 and Path("hard.jsonl").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(monkeypatch, capsys):
    """The disk is full when the new file is to take its place."""

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_gym.atomic.os.replace", full)
    before = sorted(path.name for path in Path().iterdir())
    assert data("clean", "good.jsonl", "--out", "clean.jsonl") == 2 and "No space left" in one_line(capsys)
    assert data("split", "good.jsonl", "--out", "parts") == 2 and "No space left" in one_line(capsys)
    assert sorted(path.name for path in Path().iterdir()) == before


def test_split(capsys):
    rows = [{"prompt": f"{'Q' if i % 2 else 'q'}uestion {i // 3}?", "completion": str(i)} for i in range(300)]
    lines = [json.dumps(row) + "\n" for row in rows]
    Path("all.jsonl").write_text("".join(lines))
    shares = ["--fractions", "train=0.7", "valid=0.2", "test=0.1"]
    assert data("split", "all.jsonl", "--out", "parts", *shares) == 0
    shown = table(capsys.readouterr().out)
    parts = {
        name: Path(f"parts/{name}.jsonl").read_text().splitlines(keepends=True) for name in ("train", "valid", "test")
    }
    assert sorted(sum(parts.values(), [])) == sorted(lines)
    assert all(part == [line for line in lines if line in part] for part in parts.values())  # in their order
    prompts = {name: {json.loads(line)["prompt"].lower() for line in part} for name, part in parts.items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 100
    assert (
        shown["train.jsonl"]
        == f"rows {len(parts['train'])} ({len(parts['train']) / 300:.1%}), prompts {len(prompts['train'])}"
    )
    record = json.loads(Path("parts/split.json").read_text())
    assert record["sha256"] == hashlib.sha256(Path("all.jsonl").read_bytes()).hexdigest()
    assert record["file"] == "all.jsonl" and record["seed"] == 0 and record["rows"]["test"] == len(parts["test"])

    # Rows that come later move no other, and the same command gives the same files.
    Path("more.jsonl").write_text("".join(lines) + '{"prompt": "new", "completion": ""}\n')
    assert data("split", "more.jsonl", "--out", "parts", *shares) == 2
    assert "--out parts holds a split" in one_line(capsys)
    assert data("split", "more.jsonl", "--out", "parts", "--overwrite", *shares) == 0
    for name, part in parts.items():
        assert Path(f"parts/{name}.jsonl").read_text().startswith("".join(part))
    assert data("split", "all.jsonl", "--out", "other", "--seed", "1", *shares) == 0
    assert Path("other/test.jsonl").read_text() != "".join(parts["test"])


def test_split_with_problems(capsys):
    assert data("split", "bad.jsonl", "--out", "parts") == 1
    assert "nothing was written" in capsys.readouterr().out and not Path("parts").exists()
    Path("mine").mkdir()
    Path("mine/train.jsonl").write_text("x")
    assert data("split", "good.jsonl", "--out", "mine", "--overwrite") == 2
    assert "holds files that are no split" in one_line(capsys) and Path("mine/train.jsonl").read_text() == "x"
    Path("one.jsonl").write_text('{"prompt": "a"}\n')
    assert data("split", "one.jsonl", "--out", "parts", "--fractions", "a=0.5", "b=0.5") == 0
    assert "has no row: 1 prompts are too few" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "'data' needs a second word: rlhf-gym data check, rlhf-gym data clean, rlhf-gym data split"),
        (["--json"], "'data' needs a second word"),
        (["chek", "x"], "there is no command 'data chek'; did you mean 'data check'?"),
        (["check"], "rlhf-gym data check needs a file"),
        (["check", "good.jsonl", "--tokeniser", "x"], "no flag '--tokeniser'; did you mean '--tokenizer'?"),
        (["check", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["check", "."], "there is no file '.'"),
        (["check", "good.jsonl", "--tokenizer", "./nowhere"], "no such directory"),
        (["check", "good.jsonl", "--similarity", "0"], "--similarity must be above 0 and at most 1, got 0"),
        (["check", "good.jsonl", "--max-problems", "0"], "--max-problems must be at least 1, got 0"),
        (["clean", "good.jsonl"], "--out is missing"),
        (["clean", "good.jsonl", "--out", "no/such/x.jsonl"], "there is no directory 'no/such'"),
        (["clean", "good.jsonl", "--out", "."], "--out . is a directory"),
        (["clean", "good.jsonl", "--out", "x", "--dropped", "./x"], "--out and --dropped must be two files"),
        (["clean", "nowhere.jsonl", "--out", "x"], "there is no file 'nowhere.jsonl'"),
        (["split", "good.jsonl"], "--out is missing"),
        (["split", "good.jsonl", "--out", "good.jsonl"], "is a file; name a directory"),
        (["split", "good.jsonl", "--out", "x", "--fractions", "train"], "must be name=share, each name once"),
        (["split", "good.jsonl", "--out", "x", "--fractions", "../a=1"], "must be name=share"),
        (["split", "good.jsonl", "--out", "x", "--fractions", "a=.5", "a=.5"], "must be name=share, each name once"),
        (["split", "good.jsonl", "--out", "x", "--fractions", "a=much"], "the share of a must be a number, got 'much'"),
        (["split", "good.jsonl", "--out", "x", "--fractions", "a=0.5"], "fractions must be above 0 and add up to 1"),
    ],
)
def test_wrong_usage(capsys, arguments, says):
    assert data(*arguments) == 2
    assert says in one_line(capsys)
    assert sorted(path.name for path in Path().iterdir()) == ["bad.jsonl", "good.jsonl"]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        data("--help")
    assert not stop.value.code and "data check" in capsys.readouterr().out


@pytest.mark.skipif(not HARMLESS.exists(), reason="the file of human preferences is not here")
def test_real_preferences(capsys):
    """2,308 pairs by people, in which the shorter response wins more often than not."""
    assert data("check", str(HARMLESS), "--no-near") == 0
    found = table(capsys.readouterr().out)
    assert found["format"] == "preference (standard)" and found["rows"] == "2,308" and found["problems"] == "0"
    assert 0.42 < float(found["chosen is longer"].split("%")[0]) / 100 < 0.46
    assert data("split", str(HARMLESS), "--out", "parts", "--fractions", "a=0.5", "b=0.5") == 0
    parts = [load_records(f"parts/{name}.jsonl", Preference) for name in "ab"]
    assert sum(map(len, parts)) == 2308 and abs(len(parts[0]) - 1154) < 4 * 24  # binomial, sd 24
    assert not set.intersection(*({prompt_key(record) for record in part} for part in parts))
