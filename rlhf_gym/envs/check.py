"""``check_vector_env``: does a ``gymnasium.vector.VectorEnv`` keep the contract that agents and wrappers rely on?

Gymnasium has a checker for single environments (``gymnasium.utils.env_checker.check_env``) and none for vector ones.
This is one, in the same style: a broken rule raises ``AssertionError``; what is legal but likely to hurt goes to
``gymnasium.logger.warn``. Each message begins with the name of its rule.

* spaces: ``num_envs`` >= 1, and the batched spaces are ``batch_space(single_space, num_envs)``.
* autoreset_mode: ``metadata["autoreset_mode"]`` is an ``AutoresetMode``, the instance's own where it can be chosen.
* signature: ``reset(*, seed, options)`` and ``step(actions)`` can be called so and return tuples of 2 and 5.
* observations: every array has the dtype and shape of its space and lies in it.
* rewards: finite numbers of shape (num_envs,). Warning: not floating point.
* ends: ``terminations`` and ``truncations`` are bool of shape (num_envs,). Warning: both True in one row.
* infos: a dict; ``_key`` masks are bool of shape (num_envs,); arrays have ``num_envs`` rows. Warning: other values.
* action_mask: int8 of shape (num_envs, n), 0 and 1, with an action allowed in each live row.
* actions: ``step`` does not write into them.
* seeding: one seed, one stream of results, whatever was pending before the reset; a list of seeds, where accepted, too.
  Warning: streams equal only nearly; another seed without effect; a list of seeds unlike the int that stands for it.
* shared_memory: what two calls returned shares no memory, nor does ``final_obs`` with the observations.
* callers_data: writing into what calls returned, or into actions already taken, changes nothing that follows.
* next_step: the step after an end pays 0, does not end, and ignores its action.
* same_step: ``final_obs``, ``final_info`` and their masks hold for exactly the rows that ended.
* reset_mask: a masked reset leaves the other rows' bits. Warning: it changes their future, or the caller's options.
* fresh_episode: warning when every episode starts with the observation on which the one before ended.
* episode_end: warning when no episode ended, so that the rules about autoreset could not be checked.
* render: ``render_mode`` is declared, and ``render()`` gives a frame for each row.
* close: ``close()`` can be called twice.

Arrays may be numpy's or torch's, on any device; an environment that returns tensors is given its actions as tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from gymnasium import error, spaces
from gymnasium.spaces.utils import is_space_dtype_shape_equiv
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from .check_calls import Call, Player, seeded_copy, warn
from .nested import describe, difference, shared_part

__all__ = ["check_vector_env"]


def check_vector_env(
    envs: VectorEnv,
    *,
    num_steps: int = 100,
    seed: int = 123,
    act: Callable[[Any, dict[str, Any]], Any] | None = None,
    before_step: Callable[[Any, dict[str, Any], Any], None] | None = None,
    reset_mask: bool | None = None,
    skip_render_check: bool = False,
    skip_close_check: bool = False,
) -> None:
    """Check that a vector environment keeps Gymnasium's contract. The module's docstring lists the rules.

    A stream of ``num_steps`` valid random steps is recorded and played again several times; the environment is closed.

    Args:
        envs: Any vector environment. Wrappers that write clock times into infos (``RecordEpisodeStatistics``) break
            the rule "seeding": check what is beneath them.
        num_steps: Steps in the recorded stream; enough for some episodes to end.
        seed: Seed of the environment and of the random actions.
        act: ``act(observations, infos) -> actions``, instead of random actions, for environments in which these reach
            no end. Random actions of a ``Discrete`` space honour ``infos["action_mask"]``.
        before_step: ``before_step(observations, infos, actions)`` is called before each step, for environments that
            want to be told something first, such as ``announce_logprobs`` when ``kl_coef > 0``. It must be a function
            of its arguments alone, or the streams cannot be compared.
        reset_mask: Whether to check ``reset(options={"reset_mask": ...})``. None: in DISABLED mode only, which cannot
            go on without; in the other modes it is an extension.
        skip_render_check: Do not call ``render()``.
        skip_close_check: Leave the environment open.

    Raises:
        TypeError: If ``envs`` is no ``gymnasium.vector.VectorEnv``.
        ValueError: If ``num_steps`` < 1.
        AssertionError: If a rule is broken. The message gives the rule, the call, the row and the value.

    Source:
        Gymnasium's ``check_env`` and its documentation of autoreset modes (https://farama.org/Vector-Autoreset-Mode).

    Example:
        >>> import gymnasium as gym
        >>> check_vector_env(gym.make_vec("CartPole-v1", num_envs=3))
    """
    if not isinstance(envs, VectorEnv):
        raise TypeError(f"envs must be a gymnasium.vector.VectorEnv, got {type(envs).__name__}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}.")

    _check_spaces(envs)
    mode = _check_autoreset_mode(envs)
    _check_signatures(envs)
    player = Player(envs, mode, seed, act, before_step)
    calls = list(player.play(num_steps))
    _check_episodes(player, calls)
    _check_shared_memory(player, num_steps)
    if envs.spec is None or not envs.spec.nondeterministic:
        _check_seeding(player, calls)
        _check_callers_data(player, calls)
        if mode is AutoresetMode.NEXT_STEP:
            _check_ignored_actions(player, calls)
        if reset_mask or (reset_mask is None and mode is AutoresetMode.DISABLED):
            _check_reset_mask(player, calls)
    if not skip_render_check and envs.render_mode is not None:
        _check_render(envs)
    if not skip_close_check:
        _check_close(envs)


def _check_spaces(envs: VectorEnv) -> None:
    num_envs: Any = getattr(envs, "num_envs", None)
    if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
        raise AssertionError(f"spaces: num_envs must be an int >= 1, got {num_envs!r}.")
    for name in ("observation_space", "action_space"):
        single: Any = getattr(envs, f"single_{name}", None)
        batched: Any = getattr(envs, name, None)
        for label, space in ((f"single_{name}", single), (name, batched)):
            if not isinstance(space, spaces.Space):
                raise AssertionError(f"spaces: {label} must be a gymnasium.Space, got {space!r}.")
        expected = batch_space(single, int(num_envs))
        # Bounds of observations may differ between rows (SyncVectorEnv's observation_mode="different"), of actions not.
        equal = batched == expected if name == "action_space" else is_space_dtype_shape_equiv(batched, expected)
        if not equal:
            raise AssertionError(
                f"spaces: {name} must be batch_space(single_{name}, num_envs) = {expected}, got {batched}."
            )


def _check_autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise AssertionError(
            f'autoreset_mode: metadata["autoreset_mode"] must be a gymnasium.vector.AutoresetMode, got {mode!r}.'
        )
    base = envs.unwrapped
    of_class = any(base.metadata is vars(cls).get("metadata") for cls in type(base).__mro__)
    if of_class and "autoreset_mode" in inspect.signature(type(base).__init__).parameters:
        raise AssertionError(
            f"autoreset_mode: {type(base).__name__} can be made with different modes, but its metadata is the class's, "
            'so that they overwrite each other\'s. Set self.metadata = {**self.metadata, "autoreset_mode": mode}.'
        )
    return mode


def _check_signatures(envs: VectorEnv) -> None:
    for method, args, kwargs, wanted in (
        (envs.reset, (), {"seed": 0, "options": {}}, "reset(*, seed=None, options=None)"),
        (envs.step, (None,), {}, "step(actions)"),
    ):
        try:
            inspect.signature(method).bind(*args, **kwargs)
        except TypeError as e:
            raise AssertionError(f"signature: must be {wanted}, but {e}.") from e


def _check_episodes(player: Player, calls: list[Call]) -> None:
    if not any(call.ended.any() for call in calls):
        warn(
            f"episode_end: no episode ended in {len(calls)} calls, so that the rules about autoreset were not checked. "
            "Raise num_steps, or give act= a policy that reaches an end."
        )
    stale = [
        not difference(last, player.rows(call)[i]) for call in calls for i, last in call.final_observations.items()
    ]
    varies = any(difference(calls[0].observations, call.observations) for call in calls)
    if stale and all(stale) and varies:
        warn(
            f"fresh_episode: each of {len(stale)} new episodes started with the observation on which the last one had "
            "ended. Are the rows reset, and is the new observation returned?"
        )


def _check_shared_memory(player: Player, num_steps: int) -> None:
    # All pairs of a hundred calls are too many: the start, two ends with what is around them, and a last reset.
    names = {2: ("observations", "infos"), 5: ("observations", "rewards", "terminations", "truncations", "infos")}
    held: dict[str, dict[str, Any]] = {}
    previous: dict[str, dict[str, Any]] = {}
    num_ends = after_end = 0
    for i, call in enumerate(player.play(num_steps)):
        returned = {call.source: dict(zip(names[len(player.raw)], player.raw, strict=True))}
        if call.ended.any() and call.actions is not None:
            num_ends, after_end = num_ends + 1, 3
            held |= previous
        if i < 3 or after_end > 0:
            held |= returned
        after_end -= 1
        if num_ends >= 2 and after_end <= 0:
            break
        previous = returned
    held["a last `reset()`"] = dict(zip(names[2], (player.reset(), player.raw)[1], strict=True))
    for (source_1, returned_1), (source_2, returned_2) in combinations(held.items(), 2):
        if paths := shared_part(returned_1, returned_2):
            raise AssertionError(
                f"shared_memory: {paths[0]} of {source_1} and {paths[1]} of {source_2} share memory, so that writing "
                "into one changes the other. Return copies."
            )


def _check_seeding(player: Player, calls: list[Call]) -> None:
    # First only as far as an end, so that the second seeded reset finds unfinished episodes and rows awaiting a reset.
    first_end = next((i for i, call in enumerate(calls) if call.ended.any()), len(calls) // 2)
    premise = f"seeding: the same actions after `reset(seed={player.seed})` gave another result in"
    player.replay(calls[: first_end + 1], premise)
    if nearly := player.replay(calls, premise):
        warn(f"seeding: two streams of one seed are equal only nearly: {nearly}.")

    def two_resets(seed: Any) -> tuple[Any, Any]:
        return player.reset(seed).observations, player.reset().observations

    ours = two_resets(player.seed)
    if found := difference(ours, two_resets(player.seed), "observations", exact=False):
        raise AssertionError(f"seeding: `reset()` after `reset(seed={player.seed})` was not the same again: {found}.")
    if difference(*ours) and not difference(ours, two_resets(player.seed + player.envs.num_envs)):
        warn(
            "seeding: `reset()` differs from call to call, but two seeds give the same observations. Is the seed used?"
        )

    seeds = [player.seed + i for i in range(player.envs.num_envs)]
    try:
        listed = two_resets(seeds)
    except (TypeError, ValueError, error.Error):
        return  # lists are an extension, of SyncVectorEnv for one
    if found := difference(listed, two_resets(seeds), "observations", exact=False):
        raise AssertionError(f"seeding: `reset(seed={seeds})` was not the same again: {found}.")
    if difference(listed, ours):
        warn(f"seeding: `reset(seed={seeds})` differs from `reset(seed={player.seed})`; in SyncVectorEnv they are one.")


def _check_callers_data(player: Player, calls: list[Call]) -> None:
    player.scribble = True
    player.replay(
        calls,
        "callers_data: the environment works on arrays that it gave away or was lent, for writing into the results and "
        "actions of earlier calls changed",
    )
    player.scribble = False


def _check_ignored_actions(player: Player, calls: list[Call]) -> None:
    space = seeded_copy(player.envs.single_action_space, player.seed + 1)

    def another(action: Any) -> Any:
        return (
            space.start + (action - space.start + 1) % space.n if isinstance(space, spaces.Discrete) else space.sample()
        )

    def change(call: Call) -> Any:
        rows = player.action_rows(call.actions)
        return player.batch_actions([another(row) if call.pending[i] else row for i, row in enumerate(rows)])

    player.replay(calls, "next_step: the step after an end must ignore its action, but another one changed", change)


def _check_reset_mask(player: Player, calls: list[Call]) -> None:
    # Row 0 is reset in the midst of its episode (Player compares the observations); the others must go on as before.
    first_end = next((i for i, call in enumerate(calls) if call.ended.any()), len(calls))
    split = max(1, first_end // 2)
    player.replay(calls[:split], "seeding: the same actions gave another result in")
    player.reset(mask=np.arange(player.envs.num_envs) == 0)
    space = seeded_copy(player.envs.single_action_space, player.seed)
    for old in calls[split:first_end]:
        new = player.step(player.batch_actions([player.sample(space)[0], *player.action_rows(old.actions)[1:]]))
        rows = [list(zip(player.rows(call), *call.outcome, strict=True)) for call in (old, new)]
        if found := difference(rows[0][1:], rows[1][1:], "rows[1:]", exact=False):
            warn(f"reset_mask: a masked reset of row 0 changed the future of other rows: in {new.source} {found}.")
        if found or new.ended.any():
            return


def _check_render(envs: VectorEnv) -> None:
    modes = envs.metadata.get("render_modes", [])
    if envs.render_mode not in modes:
        raise AssertionError(f"render: render_mode {envs.render_mode!r} is not in metadata['render_modes'], {modes}.")
    envs.reset()
    frames = envs.render()
    if envs.render_mode == "human":
        return
    if not isinstance(frames, (tuple, list)) or len(frames) != envs.num_envs:
        raise AssertionError(
            f"render: render() must give a frame for each of {envs.num_envs} rows, got {describe(frames)}."
        )
    for frame in frames:
        if envs.render_mode == "ansi" and not isinstance(frame, str):
            raise AssertionError(f"render: a frame of mode 'ansi' must be a str, got {describe(frame)}.")
        if envs.render_mode == "rgb_array" and not (
            isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        ):
            raise AssertionError(f"render: a frame of mode 'rgb_array' must be uint8 (H, W, 3), got {describe(frame)}.")


def _check_close(envs: VectorEnv) -> None:
    for nth in ("first", "second"):
        try:
            envs.close()
        except Exception as e:
            raise AssertionError(f"close: the {nth} call of close() raised {type(e).__name__}: {e}") from e
