"""Unit tests of programs: what counts as passed, and hand-made programs that try to get out or to cheat."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_gym.rewards import RewardError, RewardInputs, as_reward, unit_tests
from rlhf_gym.rewards.sandbox_program import encode
from rlhf_gym.rewards.unit_tests import decode, passes, program_of, read_tests


def sandbox_or_skip(**limits):
    from rlhf_gym.rewards.sandbox import Limits, Sandbox, SandboxError

    try:
        return Sandbox(Limits(**limits))
    except SandboxError as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture(scope="module")
def sandbox():
    return sandbox_or_skip(seconds=2.0, memory_mb=256, output_kb=64)


def passed(sandbox, program, *tests):
    return [passes(sandbox, program, test) for test in read_tests(list(tests), "here")]


# ---- what is run, and only when asked


def test_off_unless_asked_for(monkeypatch):
    with pytest.raises(ValueError, match="pass run_code=True"):
        unit_tests()
    with pytest.raises(ValueError, match=r"pass rlhf_gym.rewards.unit_tests\(run_code=True\)"):
        as_reward("unit_tests")


@pytest.mark.skipif(sys.platform != "linux", reason="the message is that of Linux")
def test_refused_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="there is no bubblewrap.*apt-get install bubblewrap"):
        unit_tests(run_code=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the message is that of Linux")
def test_refused_where_bubblewrap_does_not_work(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    with pytest.raises(OSError, match="does not start: bwrap: No permissions to create new namespace; it needs"):
        unit_tests(run_code=True)


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": 1}, {"output_kb": float("nan")}])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=f"limits: {next(iter(limits))} must be"):
        unit_tests(run_code=True, **limits)


def test_program_of_a_response():
    assert program_of("x = 1\n") == "x = 1\n"
    assert program_of("First:\n```python\na = 1\n```\nBetter:\n```\na = 2\n```\nDone.") == "a = 2\n"
    assert program_of("```text\noutput\n```\nso\n```py\nb = 3\n```\n```bash\nls\n```") == "b = 3\n"


@pytest.mark.parametrize(
    "cell",
    [
        "assert f(1) == 2",
        [],
        [3],
        ["f(1) == 2"],
        ["assert f(1)"],
        ["assert f(1) < 2"],
        ["assert f(1) == g(2)"],  # code on the right would have to run where the program can change it
        ["assert 1 == f(1) == 1"],
        ["assert f(1) == 2\nassert f(2) == 3"],
        [{"stdin": "1"}],
        [{"stdin": 1, "stdout": "1"}],
    ],
)
def test_tests_that_cannot_be_read(cell):
    with pytest.raises(ValueError, match="row 7"):
        read_tests(cell, "row 7")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        2.5,
        "é\n",
        b"\x00\xff",
        [1, [2]],
        (1, "a"),
        {1, 2},
        frozenset([3]),
        {(1, 2): [3], "k": None},
        1 + 2j,
        [],
        {},
    ],
)
def test_values_come_back_as_they_were(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    "claim", [[1], {"bytes": 10**12}, {"object": []}, {"set": [{"list": []}]}, {"list": [], "set": []}]
)
def test_claims_that_are_no_values(claim):
    with pytest.raises((ValueError, TypeError)):
        decode(claim)


# ---- programs


def test_right_and_wrong(sandbox):
    tests = ["assert f(2) == 3", "assert f(-1) == 0", "assert [f(0)] == [1]", "assert f(1.5) == 2.5"]
    assert passed(sandbox, "def f(x):\n    return x + 1", *tests) == [True] * 4
    assert passed(sandbox, "def f(x):\n    return x * 2 - 1", *tests) == [True, False, False, False]
    assert passed(sandbox, "def f(x): return", *tests) == [False] * 4
    assert passed(sandbox, "def f(x) return", *tests[:1]) == [False]


def test_printing_programs(sandbox):
    program = "n = int(input())\nfor i in range(n):\n    print(i, end=' \\n')"
    tests = [{"stdin": "2\n", "stdout": "0\n1"}, {"stdin": "1\n", "stdout": "0\n"}, {"stdin": "1\n", "stdout": "00"}]
    assert passed(sandbox, program, *tests) == [True, True, False]
    assert passed(sandbox, program + "\nraise SystemExit(1)", tests[0]) == [False]
    assert passed(sandbox, "if __name__ == '__main__':\n    print(input())", {"stdin": "é", "stdout": "é"}) == [True]


CHEATS = {
    "prints that it passed": "print('passed'); print('OK\\n3'); import sys; sys.stderr.write('1 passed')",
    "ends before the test": "import os; os._exit(0)",
    "exits": "raise SystemExit(0)",
    "is equal to everything": """
class Yes(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Yes(1)""",
    "turns assertions off": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return 1",
    "writes to every pipe": """
import os
for fd in range(1, 64):
    try: os.write(fd, b'passed true 1 {"list": []}')
    except OSError: pass
os._exit(0)""",
    "replaces what reports": """
import json, os, sys
json.dumps = lambda value: 'true'
eval = compile = lambda *arguments: True
sys.modules['__main__'].encode = lambda value, depth=0: True
def f(x): return 1""",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheating_does_not_pass(sandbox, cheat):
    assert passed(sandbox, CHEATS[cheat], "assert f(2) == 271828") == [False]


def test_the_answer_is_nowhere_in_there(sandbox):
    program = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [str(value) for value in [*frame.f_locals.values(), *frame.f_globals.values()]]
        frame = frame.f_back
    seen += [str(found) for found in gc.get_objects() if isinstance(found, (dict, list, tuple))]
    wanted = ''.join(reversed(WANTED))
    return int(wanted) if any(wanted in text for text in seen) else 0"""
    assert passed(sandbox, program.replace("WANTED", "'828172'"), "assert f(2) == 271828") == [False]
    # It would find it: what it is given, the expression, it does find.
    assert passed(sandbox, program.replace("WANTED", "'5444333222'"), "assert f(2223334445) == 2223334445") == [True]


def test_the_right_value_passes_whatever_else_is_printed(sandbox):
    """The other side of the cheats: a failed test is one of the value, not of the noise."""
    assert passed(
        sandbox, "print('failed')\ndef f(x):\n    print('no')\n    return 271828", "assert f(2) == 271828"
    ) == [True]


def stopped(sandbox, program, stdin=""):
    start = time.monotonic()
    outcome = sandbox.run(program, stdin=stdin)
    assert time.monotonic() - start < sandbox.limits.seconds + 3
    return outcome


def test_endless_loops_are_stopped(sandbox):
    brief = sandbox_or_skip(seconds=0.3, memory_mb=256)
    assert stopped(brief, "while True: pass").exit_code != 0
    assert stopped(brief, "import time\ntime.sleep(60)").exit_code is None
    assert (
        stopped(
            brief, "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True: pass"
        ).exit_code
        != 0
    )


def test_fork_bomb(sandbox):
    program = """
import os
made = 0
for _ in range(200):
    for make in (os.fork, lambda: os.posix_spawn('/bin/true', ['true'], {})):
        try:
            make()
            made += 1
        except OSError: pass
print(made)"""
    assert stopped(sandbox, program).output == b"0\n"


def test_thread_bomb_is_bounded(sandbox):
    program = """
import threading, time
threading.stack_size(65536)
made = 0
try:
    while made < 100_000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        made += 1
except (RuntimeError, MemoryError): pass
print(made < 100_000)"""
    assert stopped(sandbox, program).output in (b"True\n", b"")


@pytest.mark.parametrize(
    "grab",
    [
        "x = bytearray(1 << 30)",
        "x = []\nwhile True: x.append('a' * 1000000)",
        "import mmap\nx = mmap.mmap(-1, 1 << 30)",
        "import os\nx = os.memfd_create('x')",
        "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()",
        "for i in range(10**6):\n    f = open(f'/tmp/{i}', 'wb'); f.write(bytes(1 << 24)); f.close()",
    ],
)
def test_memory_is_bounded(sandbox, grab):
    outcome = stopped(sandbox, f"print('before', flush=True)\n{grab}\nprint('after')")
    assert outcome.output == b"before\n" and outcome.exit_code != 0


def test_doors_to_the_kernel_are_shut(sandbox):
    program = """
import ctypes
libc = ctypes.CDLL(None)
calls = [libc.unshare(0x10000000), libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.ptrace(0, 0, None, None)]
print(calls, libc.memfd_create(b'x', 0), libc.shmget(0, 4096, 0o1600), libc.getpid() > 0)"""
    assert sandbox.run(program).output == b"[-1, -1, -1] -1 -1 True\n"


def test_ordinary_programs_run(sandbox):
    program = """
import asyncio, concurrent.futures, hashlib, random, re, sqlite3, ssl, tempfile
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(list(pool.map(abs, [-1, 2])), asyncio.run(asyncio.sleep(0, 3)), hashlib.md5(b'').hexdigest()[:2])
with tempfile.TemporaryFile() as file:
    print(file.write(b'abc'), sqlite3.connect(':memory:').execute('select 5').fetchone()[0])
exit()"""
    assert sandbox.run(program).output == b"[1, 2] 3 d4\n3 5\n" and sandbox.run(program).exit_code == 0


def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""
import socket
for address in (('127.0.0.1', {port}), ('192.0.2.1', 80)):
    try: socket.create_connection(address, 1); print('reached')
    except OSError as error: print('refused')
print(len(socket.if_nameindex()))"""
        socket.create_connection(("127.0.0.1", port)).close()  # it can be reached from here
        assert sandbox.run(program).output == b"refused\nrefused\n1\n"  # the one is its own loopback


def test_host_files_are_not_there(sandbox, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    home = os.path.expanduser("~")
    beginning = sys.base_prefix[len(home) + 1 :].split("/")[0] if sys.base_prefix.startswith(home + "/") else None
    paths = [str(tmp_path / "secret.txt"), "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/sys/class", __file__]
    program = f"""
import os
for path in {paths}:
    print(os.path.exists(path))
home = {home!r}
print(sorted(os.listdir(home)) if os.path.isdir(home) else [])
print(os.listdir('.'))"""
    assert (tmp_path / "secret.txt").exists() and os.path.exists("/etc/passwd")
    seen = [] if beginning is None else [beginning]  # the interpreter's own folder, where it lives there
    assert sandbox.run(program).output.decode() == "False\n" * 6 + f"{seen}\n[]\n"


def test_nothing_outside_can_be_written(sandbox, tmp_path):
    folders = ["/", "/usr", "/usr/bin", "/dev", "/dev/shm", "/etc", "/var/tmp", str(tmp_path), os.getcwd()]
    program = f"""
import os, sys
for folder in {folders} + [sys.base_prefix]:
    try:
        open(folder + '/written-by-a-test', 'w').write('x')
        print('wrote', folder)
    except OSError: pass
for fd in range(3, 64):
    try:
        os.write(fd, b'') or os.ftruncate(fd, 0)
        print('shortened', fd)
    except OSError: pass
open('/tmp/mine', 'w').write('x')
print(os.listdir('/tmp'))"""
    assert sandbox.run(program).output == b"['mine']\n"
    assert sandbox.run("import os; print(os.listdir('/tmp'))").output == b"[]\n"  # gone with its run
    assert list(tmp_path.iterdir()) == []


def test_no_environment(sandbox, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    program = "import os, platform\nprint('secret' in str(os.environ), len(os.environ), platform.node(), os.getuid())"
    assert sandbox.run(program).output == b"False 6 sandbox 65534\n"


def test_what_is_printed_is_bounded(sandbox):
    outcome = stopped(sandbox, "while True: print('x' * 10000)")
    assert outcome.exit_code is None and len(outcome.output) <= 64 * 1024 + 65536
    assert passed(sandbox, "def f():\n    return 'x' * 10**7", "assert f() == 'x'") == [False]
    brief = sandbox_or_skip(seconds=0.3, memory_mb=256)
    assert brief.run("def f():\n    while True: print('x' * 10000)", "f()").exit_code != 0  # nobody reads; time is up


def test_nothing_lives_on(sandbox):
    def living():
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += b"only-in-this-test" in path.read_bytes()
        return found

    program = "import time\nwhile True: time.sleep(1)"
    brief = sandbox_or_skip(seconds=0.3, memory_mb=128)
    brief._harness += "# only-in-this-test"
    thread = threading.Thread(target=brief.run, args=(program,))
    thread.start()
    while thread.is_alive() and not living():
        time.sleep(0.01)
    assert living()  # the negative control: it can be seen while it is there
    thread.join()
    end = time.monotonic() + 5
    while living() and time.monotonic() < end:
        time.sleep(0.02)
    assert not living()


# ---- as a reward


def test_reward(sandbox):
    right = "Here:\n```python\ndef f(x):\n    return x + 1\n```"
    half = "```python\ndef f(x):\n    return 3\n```"
    tests = ["assert f(2) == 3", "assert f(3) == 4"]
    inputs = RewardInputs(
        ["add one"] * 4,
        [right, half, "I cannot.", right],
        [[1]] * 4,
        [[2]] * 4,
        {"tests": [tests, tests, tests, None]},
    )
    share = as_reward(unit_tests(run_code=True, seconds=3))
    assert share.columns_needed == ("tests",) and share.names == ("unit_tests",)
    assert share.score(inputs).total.tolist() == [1.0, 0.5, 0.0, 0.0]
    strict = as_reward(unit_tests(run_code=True, all_or_nothing=True))
    assert strict.score(inputs).total.tolist() == [1.0, 0.0, 0.0, 0.0]
    broken = RewardInputs(["p"], ["r"], [[1]], [[2]], {"tests": [["assert f(2)"]]})
    with pytest.raises(RewardError, match="row 0: the column 'tests': test 0 must be"):
        share.score(broken)
