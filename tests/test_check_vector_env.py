"""check_vector_env accepts Gymnasium's own environments and ours, and catches each defect of a set of broken ones."""

from __future__ import annotations

import itertools
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlhf_gym import check_vector_env

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
MODES = [NEXT_STEP, SAME_STEP, DISABLED]


class Walks(VectorEnv):
    """Rows walk right by action + 1 from a random place; an episode ends at 8. The reward is the way made.

    Correct in all modes, as numpy or torch. Subclasses each break one rule.
    """

    metadata = {"render_modes": ["ansi"], "autoreset_mode": NEXT_STEP}

    def __init__(self, num_envs=3, autoreset_mode=NEXT_STEP, output="numpy", render_mode=None):
        self.num_envs, self.mode, self.output, self.render_mode = num_envs, autoreset_mode, output, render_mode
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        self.single_observation_space = spaces.Dict(
            place=spaces.Box(0, 20, (), np.float32), steps=spaces.Box(0, 200, (1,), np.int64)
        )
        self.single_action_space = spaces.Discrete(3, start=1)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.place, self.steps = np.zeros(num_envs, np.float32), np.zeros((num_envs, 1), np.int64)
        self.ended = np.zeros(num_envs, bool)
        self.rngs = [np.random.default_rng() for _ in range(num_envs)]

    def out(self, x):
        return torch.tensor(x) if self.output == "torch" else x.copy()

    def observe(self):
        return {"place": self.out(self.place), "steps": self.out(self.steps)}

    def begin(self, rows):
        for i in np.flatnonzero(rows):
            self.place[i], self.steps[i], self.ended[i] = self.rngs[i].integers(4), 0, False

    def describe(self):
        mask = np.ones((self.num_envs, 3), np.int8)
        mask[:, 2] = self.place < 4  # action 3 is for the first half of the way only
        return {"action_mask": self.out(mask), "_action_mask": self.out(np.ones(self.num_envs, bool))}

    def reset(self, *, seed=None, options=None):
        seeds = [None] * self.num_envs if seed is None else seed
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seeds, int) else seeds
        self.rngs = [rng if s is None else np.random.default_rng(s) for rng, s in zip(self.rngs, seeds, strict=True)]
        self.begin((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        return self.observe(), self.describe()

    def step(self, actions):
        actions = np.asarray(actions)
        assert self.action_space.contains(actions)
        resetting = self.ended.copy() if self.mode is NEXT_STEP else np.zeros(self.num_envs, bool)
        assert self.mode is not DISABLED or not self.ended.any()
        allowed = (actions < 3) | (self.place < 4) | resetting
        assert allowed.all(), "a masked action was taken"
        self.place += np.where(resetting, 0, actions)
        self.steps += ~resetting[:, None]
        self.begin(resetting)
        terminations = (self.place >= 8) & ~resetting
        self.ended |= terminations
        rewards = np.where(resetting, 0, actions).astype(np.float32)
        infos = self.final(terminations) if self.mode is SAME_STEP and terminations.any() else {}
        truncations = np.zeros(self.num_envs, bool)
        infos |= self.describe()
        return self.observe(), self.out(rewards), self.out(terminations), self.out(truncations), infos

    def final(self, ended):
        last = self.observe()
        if self.output == "numpy":
            rows = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(ended):
                rows[i] = {key: value[i].copy() for key, value in last.items()}
            last = rows
        way = np.where(ended, self.place, np.nan).astype(np.float32)
        self.begin(ended)
        mask = self.out(ended)
        return {
            "final_obs": last,
            "_final_obs": mask,
            "final_info": {"way": self.out(way), "_way": self.out(ended)},
            "_final_info": self.out(ended),
        }

    def render(self):
        return tuple("." * int(place) + "o" for place in self.place)


def check(envs, **kwargs):
    """With every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vector_env(envs, **kwargs)


# ---- what is right passes


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("mode", MODES)
def test_a_correct_environment_passes(mode, output):
    check(Walks(autoreset_mode=mode, output=output, render_mode="ansi"), reset_mask=True)


def test_one_row_passes():
    check(Walks(1, autoreset_mode=DISABLED))


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1"])
def test_gymnasiums_sync_environments_pass(env_id, mode):
    check(gym.make_vec(env_id, 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}))


def test_gymnasiums_sync_environment_changes_the_options():
    envs = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": DISABLED})
    with pytest.warns(UserWarning) as record:
        check_vector_env(envs)
    assert len(record) == 1 and "reset_mask" in str(record[0].message) and "options" in str(record[0].message)


def test_gymnasiums_native_environment_passes():
    check(gym.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point"))


def test_wrapped_environments_pass():
    check(gym.wrappers.vector.TransformReward(gym.make_vec("CartPole-v1", 2), lambda r: 2 * r))


def test_the_environment_is_left_open_on_demand_and_its_action_space_untouched():
    envs, twin = Walks(), Walks()
    envs.action_space.seed(7)
    twin.action_space.seed(7)
    check(envs, skip_close_check=True)
    assert not envs.closed
    np.testing.assert_array_equal(envs.action_space.sample(), twin.action_space.sample())


# ---- the helpers of those who check


def test_before_step_comes_before_each_step_and_sees_its_actions():
    class Told(Walks):
        told = None

        def step(self, actions):
            assert self.told is not None, "not told"
            np.testing.assert_array_equal(self.told, actions)
            self.told = None
            return super().step(actions)

    def tell(observations, infos, actions):
        assert set(observations) == {"place", "steps"} and "action_mask" in infos
        envs.told = np.array(actions)

    envs = Told()
    check(envs, before_step=tell)
    with pytest.raises(AssertionError, match="not told"):
        check(Told())


def test_act_replaces_random_actions():
    taken = []

    class Seen(Walks):
        def step(self, actions):
            taken.append(np.array(actions))
            return super().step(actions)

    check(Seen(autoreset_mode=SAME_STEP), act=lambda observations, infos: np.full(3, 2))
    assert {int(a) for actions in taken for a in actions} == {2}


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="envs must be a gymnasium.vector.VectorEnv, got TimeLimit"):
        check_vector_env(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        check_vector_env(Walks(), num_steps=0)


# ---- what is wrong is caught: (rule and what the message must say, mode, class)

DEFECTS = []


def defect(message, mode=NEXT_STEP, **arguments):
    def add(cls):
        DEFECTS.append(pytest.param(message, cls, {"autoreset_mode": mode, **arguments}, id=cls.__name__))
        return cls

    return add


class Patched(Walks):
    """Calls ``patch`` on the five results of each step."""

    def step(self, actions):
        results = list(super().step(actions))
        self.patch(results)
        return tuple(results)


@defect("spaces: num_envs must be an int >= 1, got None")
class NoNumEnvs(Walks):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.num_envs = None


@defect("spaces: action_space must be batch_space")
class ActionSpaceOfOtherSize(Walks):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.action_space = spaces.MultiDiscrete([4, 4, 4])


@defect("spaces: observation_space must be batch_space")
class ObservationSpaceNotBatched(Walks):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = self.single_observation_space


@defect("autoreset_mode: .* got None")
class NoMode(Walks):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        del self.metadata["autoreset_mode"]


@defect("autoreset_mode: .* got 'NextStep'")
class ModeIsAString(Walks):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metadata["autoreset_mode"] = "NextStep"


@defect("autoreset_mode: .* the class's")
class ModeOnTheClass(Walks):
    metadata = dict(Walks.metadata)

    def __init__(self, autoreset_mode, **kwargs):
        super().__init__(autoreset_mode=autoreset_mode, **kwargs)
        type(self).metadata["autoreset_mode"] = autoreset_mode
        del self.metadata


@defect("signature: must be reset")
class ResetWithoutOptions(Walks):
    def reset(self, *, seed=None):
        return super().reset(seed=seed)


@defect("signature: `reset")
class ResetWithoutInfos(Walks):
    def reset(self, **kwargs):
        return super().reset(**kwargs)[0]


@defect("signature: `step")
class OldStep(Walks):
    def step(self, actions):
        observations, rewards, terminations, _, infos = super().step(actions)
        return observations, rewards, terminations, infos


@defect("observations: observations\\['place'\\] of `step` .* dtype float32 .* got ndarray of dtype float64")
class WrongDtype(Patched):
    def patch(self, results):
        results[0]["place"] = results[0]["place"].astype(np.float64)


@defect(
    "observations: observations\\['place'\\] of `step` .* dtype float32 .* got Tensor of dtype torch.float64",
    output="torch",
)
class WrongTorchDtype(Patched):
    def patch(self, results):
        results[0]["place"] = results[0]["place"].double()


@defect("observations: observations\\['steps'\\] .* shape \\(3, 1\\), got ndarray of dtype int64 and shape \\(3,\\)")
class WrongShape(Patched):
    def patch(self, results):
        results[0]["steps"] = results[0]["steps"][:, 0]


@defect("observations: observations\\['place'\\] of `step` .* is not in Box")
class OutOfBounds(Patched):
    def patch(self, results):
        results[0]["place"] -= 21


@defect("observations: observations of `step` .* dict of \\['place', 'steps'\\]")
class MissingKey(Patched):
    def patch(self, results):
        del results[0]["steps"]


@defect("rewards: rewards .* shape \\(3,\\), got list")
class RewardsAreAList(Patched):
    def patch(self, results):
        results[1] = results[1].tolist()


@defect("rewards: rewards .* must be numbers, got .* bool")
class RewardsAreBool(Patched):
    def patch(self, results):
        results[1] = results[1] > 0


@defect("rewards: row 1 of `step` .* finite, got nan")
class RewardIsNaN(Patched):
    def patch(self, results):
        results[1][1] = np.nan


@defect("ends: truncations of `step` .* must be bool, got .* int64")
class IntegerEnds(Patched):
    def patch(self, results):
        results[3] = results[3].astype(int)


@defect("infos: infos of `step` .* must be a dict, got list")
class ListInfos(Patched):
    def patch(self, results):
        results[4] = [{}] * 3


@defect("infos: infos\\['_x'\\] .* must be bool of shape \\(3,\\), got .* int64")
class IntegerInfoMask(Patched):
    def patch(self, results):
        results[4] |= {"x": np.zeros(3), "_x": np.ones(3, int)}


@defect("infos: infos\\['x'\\] .* must have 3 rows, got .* \\(2,\\)")
class ShortInfo(Patched):
    def patch(self, results):
        results[4] |= {"x": np.zeros(2)}


@defect("action_mask: .* must be int8 of shape \\(3, 3\\).* got .* bool")
class BoolActionMask(Patched):
    def patch(self, results):
        results[4]["action_mask"] = results[4]["action_mask"].astype(bool)


@defect("action_mask: row 0 .* allow an action", SAME_STEP)
class NothingAllowed(Patched):
    def patch(self, results):
        results[4]["action_mask"][0] = 0


@defect("actions: `step` .* wrote into")
class WritesIntoActions(Walks):
    def step(self, actions):
        results = super().step(actions)
        actions += 1
        return results


@defect("seeding: .* another result in")
class IgnoresSeed(Walks):
    def reset(self, *, seed=None, options=None):
        return super().reset(options=options)


@defect("seeding: .* another result in `step`")
class UnseededRewards(Patched):
    def patch(self, results):
        results[1] += np.random.default_rng().random(3).astype(np.float32) * (results[1] != 0)


@defect("seeding: `reset\\(\\)` after `reset\\(seed=123\\)`")
class UnseededSecondEpisodes(Walks):
    """Begins them at a place that depends on no seed and never twice in a row at the same (chance would, now and then)."""

    count = itertools.count()

    def reset(self, *, seed=None, options=None):
        results = super().reset(seed=seed, options=options)
        if seed is not None or options is not None:
            return results
        self.place[:] = next(self.count) % 4
        return self.observe(), self.describe()


@defect("seeding: .* another result in")
class ResetKeepsPendingRows(Walks):
    """A full reset in the midst of things forgets that rows no longer wait for their autoreset."""

    def reset(self, *, seed=None, options=None):
        pending = self.ended.copy()
        results = super().reset(seed=seed, options=options)
        self.ended |= pending
        return results


@defect("seeding: `reset\\(seed=\\[123, 124, 125\\]\\)` was not the same")
class UnseededLists(Walks):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if isinstance(seed, list) else seed, options=options)


@defect("shared_memory: .*'observations'.* of `reset.* and .*'observations'.* of `step` \\(call 1\\)")
class ReturnsItsBuffer(Walks):
    def observe(self):
        return {"place": self.place, "steps": self.steps.copy()}


@defect("shared_memory: .*'place'.* share memory", output="torch")
class ReturnsViewsOfItsTensor(Walks):
    def out(self, x):
        return torch.from_numpy(x)


@defect("shared_memory: \\['rewards'\\] .* and \\['rewards'\\]")
class OneRewardBuffer(Walks):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        self.buffer = getattr(self, "buffer", rewards)
        self.buffer[:] = rewards
        return observations, self.buffer, *rest


@defect("shared_memory: \\['infos'\\]\\['lengths'\\]")
class ConstantInfo(Patched):
    lengths = np.full(3, 8)

    def patch(self, results):
        results[4]["lengths"] = self.lengths[:]


@defect("shared_memory: observations.* and infos\\['final_obs'\\]", SAME_STEP, output="torch")
class FinalObservationsAreTheObservations(Patched):
    def patch(self, results):
        if "final_obs" in results[4]:
            results[4]["final_obs"] = dict(results[0])


@defect("callers_data: .* changed `step`")
class WorksOnWhatItGave(Walks):
    """Each call has arrays of its own, but the environment goes on with the ones it returned."""

    def observe(self):
        self.place = self.place.copy()
        return {"place": self.place, "steps": self.steps.copy()}


@defect("callers_data: .* changed `step`")
class WorksOnTheCallersActions(Walks):
    """Pays for an action one step late, out of the caller's array."""

    before = None

    def reset(self, **kwargs):
        self.before = None
        return super().reset(**kwargs)

    def step(self, actions):
        before, resetting = self.before, self.ended.copy()
        self.before = actions
        observations, rewards, *rest = super().step(actions)
        rewards += 0 if before is None else np.where(resetting, 0, before).astype(np.float32)
        return observations, rewards, *rest


@defect("next_step: row \\d ended before `step` .* its reward must be 0, got 1.0")
class PaysForTheReset(Walks):
    def step(self, actions):
        resetting = self.ended.copy()
        observations, rewards, *rest = super().step(actions)
        return observations, rewards + resetting, *rest


@defect("next_step: row \\d ended before `step` .* its termination must be 0, got True")
class EndsTwice(Walks):
    def step(self, actions):
        resetting = self.ended.copy()
        observations, rewards, terminations, *rest = super().step(actions)
        return observations, rewards, terminations | resetting, *rest


@defect("next_step: the step after an end must ignore its action, but another one changed")
class ActsOnTheIgnoredAction(Walks):
    def step(self, actions):
        resetting = self.ended.copy()
        _, *rest = super().step(actions)
        self.place[resetting] += actions[resetting] / 8
        return self.observe(), *rest


@defect("same_step: row \\d ended in `step` .* must hold 'final_obs' and '_final_obs'", SAME_STEP)
class NoFinalObs(Patched):
    def patch(self, results):
        results[4].pop("final_obs", None)


@defect("same_step: row \\d ended in `step` .* must hold 'final_info' and '_final_info'", SAME_STEP)
class NoFinalInfoMask(Patched):
    def patch(self, results):
        results[4].pop("_final_info", None)


@defect("same_step: infos\\['_final_obs'\\] .* must mask the rows that ended", SAME_STEP)
class FinalMaskOfAllRows(Patched):
    def patch(self, results):
        if "_final_obs" in results[4]:
            results[4]["_final_obs"] = np.ones(3, bool)


@defect("same_step: row \\d of infos\\['final_obs'\\] .* is not in single_observation_space: None", SAME_STEP)
class EmptyFinalObs(Patched):
    def patch(self, results):
        if "final_obs" in results[4]:
            results[4]["final_obs"][:] = None


@defect("same_step: row \\d ended in `step`", SAME_STEP)
class SaysSameStepButIsNextStep(Walks):
    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "autoreset_mode": NEXT_STEP})
        self.metadata["autoreset_mode"] = SAME_STEP


@defect("reset_mask: .* must leave the rows outside the mask, but its observation of row \\d", DISABLED)
class MaskedResetOfEverything(Walks):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


@defect("reset_mask: .* must leave the rows outside the mask, but its observation of row \\d\\['steps'\\]", DISABLED)
class MaskedResetTouchesCounters(Walks):
    def reset(self, *, seed=None, options=None):
        self.steps += 1 if options and "reset_mask" in options else 0
        return super().reset(seed=seed, options=options)


@defect("render: render\\(\\) must give a frame for each of 3 rows", render_mode="ansi")
class OneFrame(Walks):
    def render(self):
        return super().render()[:1]


@defect("render: render_mode 'rgb_array' is not in", render_mode="rgb_array")
class UndeclaredRenderMode(Walks):
    pass


@defect("close: the second call of close\\(\\) raised RuntimeError: closed already")
class ClosesOnce(Walks):
    def close(self):
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


@pytest.mark.parametrize("message, cls, arguments", DEFECTS)
def test_an_error_names_the_rule(message, cls, arguments):
    with pytest.raises(AssertionError, match=f"(?s)^{message}"):
        check(cls(**arguments))


# ---- what is doubtful is warned of

DOUBTS = []


def doubt(message, mode=NEXT_STEP, **arguments):
    def add(cls):
        DOUBTS.append(pytest.param(message, cls, {"autoreset_mode": mode, **arguments}, id=cls.__name__))
        return cls

    return add


@doubt("rewards: `step` .* int64.* floating point")
class IntegerRewards(Patched):
    def patch(self, results):
        results[1] = results[1].astype(int)


@doubt("ends: row \\d of `step` .* terminated and truncated")
class BothEnds(Patched):
    def patch(self, results):
        results[3] |= results[2]


@doubt("infos: infos\\['clock'\\] .* array of 3 rows, got int 8")
class ScalarInfo(Patched):
    def patch(self, results):
        results[4]["clock"] = 8


@doubt("seeding: two streams of one seed are equal only nearly: rewards")
class NearlyTheSame(Patched):
    def patch(self, results):
        self.count = getattr(self, "count", 0) + 1
        results[1] *= np.float32(1 + 1e-6 * (self.count % 7))


@doubt("seeding: .* two seeds give the same observations")
class OneSeedForAll(Walks):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else 5, options=options)


@doubt("seeding: `reset\\(seed=\\[123, 124, 125\\]\\)` differs from `reset\\(seed=123\\)`")
class ListsOfTheirOwn(Walks):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=[s + 9 for s in seed] if isinstance(seed, list) else seed, options=options)


@doubt("reset_mask: .* changed the caller's options", DISABLED)
class PopsTheMask(Walks):
    def reset(self, *, seed=None, options=None):
        results = super().reset(seed=seed, options=options)
        (options or {}).pop("reset_mask", None)
        return results


@doubt("reset_mask: .* changed the caller's options", DISABLED)
class WritesIntoTheMask(Walks):
    def reset(self, *, seed=None, options=None):
        results = super().reset(seed=seed, options=options)
        if options:
            options["reset_mask"][:] = True
        return results


@doubt("reset_mask: a masked reset of row 0 changed the future of other rows: in `step`", DISABLED)
class OneHiddenState(Walks):
    """The pay of every row falls with the number of resets."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets = self.resets + 1 if options else 0
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards / (1 + self.resets), *rest


@doubt("fresh_episode: each of \\d+ new episodes", SAME_STEP)
class ShowsTheLastObservation(Patched):
    def patch(self, results):
        if "final_obs" in results[4]:
            for i in np.flatnonzero(results[4]["_final_obs"]):
                for key in results[0]:
                    results[0][key][i] = results[4]["final_obs"][i][key]


@doubt("episode_end: no episode ended in 101 calls")
class Endless(Walks):
    def step(self, actions):
        self.place[:] = 0
        return super().step(actions)


@pytest.mark.parametrize("message, cls, arguments", DOUBTS)
def test_a_warning_names_the_rule(message, cls, arguments):
    with pytest.warns(UserWarning) as record:
        check_vector_env(cls(**arguments))
    texts = [re.sub("\x1b\\[\\d+m", "", str(w.message)) for w in record]
    assert len(texts) == 1, texts
    assert re.match(f"(?s)WARN: {message}", texts[0]), texts[0]
