"""Calls of ``reset`` and ``step``, each checked by itself, and streams of them: the ground of ``check_vector_env``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import logger, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from .nested import (
    describe,
    difference,
    freeze,
    hide_void_rows,
    is_array,
    is_object_array,
    is_tensor,
    map_leaves,
    mutable_parts,
    scribble,
    shared_part,
    torch_or_none,
)


def warn(message: str) -> None:
    logger.warn("%s", message)  # logger.warn formats its first argument, and ours may hold a percent sign


@dataclass
class Call:
    """One call and what it returned, frozen."""

    source: str
    """How messages name the call."""
    observations: Any
    infos: dict[str, Any]
    pending: np.ndarray
    """Rows that had ended and not been reset before this call. Shape (num_envs,), bool."""
    ended: np.ndarray
    """Rows that have ended and not been reset after it; in SAME_STEP, that ended in it. Shape (num_envs,), bool."""
    final_observations: dict[int, Any]
    """Rows in which an episode starts with this call -> the last observation of the one before."""
    outcome: tuple[np.ndarray, ...] = ()
    """Rewards, terminations and truncations of a step."""
    actions: Any = None
    """Of a step."""
    mask: np.ndarray | None = None
    """Of a masked reset."""

    def difference(self, other: Call, *, exact: bool = False) -> str | None:
        """Where and how the results of two calls differ, or None."""
        names = ("observations", "rewards", "terminations", "truncations")
        mine, others = (self.observations, *self.outcome), (other.observations, *other.outcome)
        found = [difference(a, b, name, exact=exact) for a, b, name in zip(mine, others, names, strict=False)]
        found.append(difference(hide_void_rows(self.infos), hide_void_rows(other.infos), "infos", exact=exact))
        return next(filter(None, found), None)


class Player:
    """Plays streams of calls on the environment and checks each call by itself.

    Args:
        envs: The environment.
        mode: Its autoreset mode.
        seed: Of the environment, and of the random actions.
        act: As in ``check_vector_env``.
        before_step: As in ``check_vector_env``.
    """

    def __init__(self, envs: VectorEnv, mode: AutoresetMode, seed: int, act: Any, before_step: Any) -> None:
        self.envs, self.mode, self.seed, self.act, self.before_step = envs, mode, seed, act, before_step
        self.scribble = False
        """Write into everything that a call took and returned, once it is recorded."""
        self.raw: tuple[Any, ...] = ()
        """What the last call returned."""
        self.seen: tuple[Any, Any] = (None, None)
        """The observations and infos that ``act`` and ``before_step`` are shown."""
        self.row_masks: list[Any] = [None] * envs.num_envs
        """The action mask in force in each row."""
        self.last: Call
        self.num_calls = 0
        self.warned: set[str] = set()
        self.premise: str | None = None
        """While a stream is replayed: what it means if the environment raises this time, rule first."""

    def warn_once(self, message: str) -> None:
        """Warn of the first call that deserves it under a rule: a hundred calls have the same fault."""
        rule = message.split(":")[0]
        if rule not in self.warned:
            self.warned.add(rule)
            warn(message)

    def reset(self, seed: Any = None, mask: np.ndarray | None = None) -> Call:
        """Reset all rows, or those in ``mask``."""
        if mask is None:
            self.num_calls = 0
            kwargs: dict[str, Any] = {} if seed is None else {"seed": seed}
            pending, rows = np.zeros(self.envs.num_envs, dtype=bool), np.ones(self.envs.num_envs, dtype=bool)
        else:
            kwargs = {"options": {"reset_mask": mask.copy()}}
            # In SAME_STEP nothing ever waits for a reset.
            pending, rows = self.last.ended & (self.mode is not AutoresetMode.SAME_STEP), mask
        options = kwargs.get("options", {})
        source = f"`reset({', '.join(f'{key}={value}' for key, value in kwargs.items())})` (call {self.num_calls})"

        raw = self._call(self.envs.reset, source, **kwargs)
        if not (isinstance(raw, tuple) and len(raw) == 2):
            raise AssertionError(f"signature: {source} must return (observations, infos), got {describe(raw)}.")
        check_observations(self.envs.observation_space, raw[0], "observations", source)
        check_infos(raw[1], self.envs.num_envs, source, self.warn_once)
        observations, infos = freeze(raw)
        call = Call(source, observations, infos, pending, pending & ~rows, {}, mask=mask)
        if mask is not None:
            if difference(options, {"reset_mask": mask}):
                self.warn_once(f"reset_mask: {source} changed the caller's options, which a wrapper may still need.")
            before, after = self.rows(self.last), self.rows(call)
            for i in np.flatnonzero(~mask):
                if found := difference(before[i], after[i], f"its observation of row {i}"):
                    raise AssertionError(f"reset_mask: {source} must leave the rows outside the mask, but {found}.")
            call.final_observations = {int(i): before[i] for i in np.flatnonzero(pending & mask)}
        return self._finish(call, raw, rows)

    def step(self, actions: Any) -> Call:
        """Step with ``actions``, which are numpy; a torch environment gets tensors."""
        self.num_calls += 1
        source = f"`step` (call {self.num_calls})"
        tensor = next((part for _, part in mutable_parts(self.raw) if is_tensor(part)), None)
        given = deepcopy(actions)
        if tensor is not None:
            given = map_leaves(lambda x: torch_or_none().as_tensor(x, device=tensor.device), given)
        if self.before_step is not None:
            self.before_step(*self.seen, given)

        raw = self._call(self.envs.step, source, given)
        if not (isinstance(raw, tuple) and len(raw) == 5):
            raise AssertionError(
                f"signature: {source} must return (observations, rewards, terminations, truncations, infos), "
                f"got {describe(raw)}."
            )
        if found := difference(actions, freeze(given), "actions"):
            raise AssertionError(f"actions: {source} wrote into the caller's array: {found}.")
        check_observations(self.envs.observation_space, raw[0], "observations", source)
        check_outcome(raw[1:4], self.envs.num_envs, source, self.warn_once)
        check_infos(raw[4], self.envs.num_envs, source, self.warn_once)
        observations, *outcome, infos = freeze(raw)
        ended = outcome[1] | outcome[2]
        call = Call(source, observations, infos, self.last.ended, ended, {}, tuple(outcome), actions)
        if self.mode is AutoresetMode.SAME_STEP:
            call.pending = np.zeros_like(ended)
            call.final_observations = check_final(call, self.envs)
            if ended.any() and (paths := shared_part(raw[0], raw[4]["final_obs"])):
                raise AssertionError(
                    f"shared_memory: observations{paths[0]} and infos['final_obs']{paths[1]} of {source} share memory."
                )
        elif self.mode is AutoresetMode.NEXT_STEP:
            check_autoreset_step(call)
            before = self.rows(self.last)
            call.final_observations = {int(i): before[i] for i in np.flatnonzero(call.pending)}
        if self.scribble:
            scribble(given)
        return self._finish(call, raw, np.ones_like(ended))

    def _call(self, method: Callable[..., Any], source: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as e:
            if self.premise is None:
                raise
            raise AssertionError(f"{self.premise} {source}: it raised {type(e).__name__}: {e}") from e

    def _finish(self, call: Call, raw: tuple[Any, ...], rows: np.ndarray) -> Call:
        self._read_action_masks(call, rows)
        self.last, self.raw, self.seen = call, raw, (raw[0], raw[-1])
        if self.scribble:
            self.seen = deepcopy(self.seen)
            scribble(raw)
        return call

    def _read_action_masks(self, call: Call, rows: np.ndarray) -> None:
        """Keep the masks of the new observations. ``rows``: those that this call moved on. Shape (num_envs,), bool."""
        space, masks = self.envs.single_action_space, call.infos.get("action_mask")
        valid = call.infos.get("_action_mask", np.ones_like(rows)) & (masks is not None)
        if masks is not None and isinstance(space, spaces.Discrete):
            shape = (self.envs.num_envs, int(space.n))
            if not (isinstance(masks, np.ndarray) and masks.dtype == np.int8 and masks.shape == shape):
                raise AssertionError(
                    f"action_mask: infos['action_mask'] of {call.source} must be int8 of shape {shape}, as "
                    f"Discrete.sample wants it, got {describe(masks)}."
                )
            # A row that waits for its reset shows the end of an episode, where no action need be allowed.
            live = valid if self.mode is AutoresetMode.SAME_STEP else valid & ~call.ended
            bad = live & (((masks != 0) & (masks != 1)).any(-1) | ~masks.any(-1))
            if bad.any():
                raise AssertionError(
                    f"action_mask: row {bad.argmax()} of infos['action_mask'] of {call.source} must hold 0 and 1 only, "
                    "and allow an action."
                )
        for i in np.flatnonzero(rows):
            self.row_masks[i] = masks[i] if masks is not None and valid[i] else None

    def rows(self, call: Call) -> list[Any]:
        """The observations of a call, row by row."""
        return observation_rows(self.envs.observation_space, call.observations)

    def action_rows(self, actions: Any) -> list[Any]:
        return list(iterate(self.envs.action_space, actions))

    def batch_actions(self, rows: list[Any]) -> Any:
        space = self.envs.single_action_space
        out: Any = create_empty_array(space, len(rows))
        return concatenate(space, rows, out)

    def sample(self, space: spaces.Space) -> list[Any]:
        """A random action for each row from a copy of ``single_action_space``; masks are honoured if ``Discrete``."""
        masked = isinstance(space, spaces.Discrete)
        return [space.sample(mask) if masked and mask is not None else space.sample() for mask in self.row_masks]

    def play(self, num_steps: int) -> Iterator[Call]:
        """A seeded stream of ``num_steps`` steps, in DISABLED mode with masked resets between them."""
        space = seeded_copy(self.envs.single_action_space, self.seed)
        yield self.reset(self.seed)
        for _ in range(num_steps):
            if self.mode is AutoresetMode.DISABLED and self.last.ended.any():
                yield self.reset(mask=self.last.ended)
            yield self.step(
                self.batch_actions(self.sample(space)) if self.act is None else freeze(self.act(*self.seen))
            )

    def replay(
        self, calls: list[Call], premise: str, change: Callable[[Call], Any] = lambda call: call.actions
    ) -> str | None:
        """Make recorded calls again, with the actions that ``change`` gives, and compare what they return.

        Args:
            calls: The stream, from its seeded reset.
            premise: Start of the error message, which goes on with the call and what is wrong: "rule: ... changed".
            change: Recorded call -> actions.

        Returns:
            The first difference within the tolerance for floats, or None.
        """
        self.premise, nearly = premise, None
        for call in calls:
            if call.actions is not None:
                new = self.step(change(call))
            else:
                new = self.reset(self.seed) if call.mask is None else self.reset(mask=call.mask)
            if found := call.difference(new):
                raise AssertionError(f"{premise} {new.source}: {found}.")
            nearly = nearly or call.difference(new, exact=True)
        self.premise = None
        return nearly


def seeded_copy(space: spaces.Space, seed: int) -> spaces.Space:
    """A copy to sample from, so that the caller's space keeps its own random state."""
    space = deepcopy(space)
    space.seed(seed)
    return space


def observation_rows(space: spaces.Space, observations: Any) -> list[Any]:
    """The rows of a frozen batch."""
    return [map_leaves(scalar_to_array, row) for row in iterate(space, observations)]


def scalar_to_array(x: Any) -> Any:
    """Rows of boxes of shape () are numpy scalars, at which ``Box.contains`` grumbles."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def check_observations(space: spaces.Space, data: Any, path: str, source: str) -> None:
    """Rule "observations": dtype and shape first, for ``contains`` does not say which of them is wrong."""
    if isinstance(space, spaces.Dict):
        if not (isinstance(data, dict) and data.keys() == space.spaces.keys()):
            raise AssertionError(
                f"observations: {path} of {source} must be a dict of {list(space.spaces)}, got {describe(data)}."
            )
        for key, subspace in space.spaces.items():
            check_observations(subspace, data[key], f"{path}[{key!r}]", source)
    elif isinstance(space, spaces.Tuple):
        if not (isinstance(data, tuple) and len(data) == len(space.spaces)):
            raise AssertionError(
                f"observations: {path} of {source} must be a tuple of {len(space.spaces)}, got {describe(data)}."
            )
        for i, subspace in enumerate(space.spaces):
            check_observations(subspace, data[i], f"{path}[{i}]", source)
    else:
        frozen = freeze(data)
        of_arrays = isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary))
        if of_arrays and not (is_array(data) and (frozen.dtype, frozen.shape) == (space.dtype, space.shape)):
            raise AssertionError(
                f"observations: {path} of {source} must be an array of dtype {space.dtype} and shape {space.shape}, "
                f"got {describe(data)}."
            )
        if not space.contains(frozen):
            raise AssertionError(f"observations: {path} of {source} is not in {space}: {frozen}.")


def check_outcome(outcome: tuple[Any, ...], num_envs: int, source: str, warn: Callable[[str], None]) -> None:
    """Rules "rewards" and "ends"."""
    rules, names = ("rewards", "ends", "ends"), ("rewards", "terminations", "truncations")
    for rule, name, data in zip(rules, names, outcome, strict=True):
        if not (is_array(data) and tuple(data.shape) == (num_envs,)):
            raise AssertionError(
                f"{rule}: {name} of {source} must be an array of shape ({num_envs},), got {describe(data)}."
            )
        kind = freeze(data).dtype.kind
        if kind not in ("fiu" if name == "rewards" else "b"):
            wanted = "numbers" if name == "rewards" else "bool"
            raise AssertionError(f"{rule}: {name} of {source} must be {wanted}, got {describe(data)}.")
        if name == "rewards" and kind != "f":
            warn(f"rewards: {source} gives {describe(data)}; agents and wrappers expect floating point.")
    rewards, terminations, truncations = freeze(outcome)
    bad = ~np.isfinite(rewards)
    if bad.any():
        raise AssertionError(f"rewards: row {bad.argmax()} of {source} must be finite, got {rewards[bad][0]}.")
    both = terminations & truncations
    if both.any():
        warn(f"ends: row {both.argmax()} of {source} is terminated and truncated: is its last state worth 0 or not?")


def check_infos(infos: Any, num_envs: int, source: str, warn: Callable[[str], None]) -> None:
    """Rule "infos": a dict of batched values; ``_key``, where there is one, says which rows of ``key`` hold."""
    if not isinstance(infos, dict):
        raise AssertionError(f"infos: infos of {source} must be a dict, got {describe(infos)}.")
    for key, value in infos.items():
        if not isinstance(key, str):
            raise AssertionError(f"infos: the keys of {source} must be strings, got {key!r}.")
        mask = infos.get(f"_{key}")
        if mask is not None and not (
            is_array(mask) and tuple(mask.shape) == (num_envs,) and freeze(mask).dtype == bool
        ):
            raise AssertionError(
                f"infos: infos['_{key}'] of {source} must be bool of shape ({num_envs},), got {describe(mask)}."
            )
        if isinstance(value, dict):
            check_infos(value, num_envs, f"{source}, {key!r}", warn)
        elif is_array(value) and tuple(value.shape[:1]) != (num_envs,):
            raise AssertionError(f"infos: infos[{key!r}] of {source} must have {num_envs} rows, got {describe(value)}.")
        elif not is_array(value):
            warn(f"infos: infos[{key!r}] of {source} should be an array of {num_envs} rows, got {describe(value)}.")


def check_final(call: Call, envs: VectorEnv) -> dict[int, Any]:
    """Rule "same_step": the infos describe the episodes that ended in this call. Returns row -> last observation."""
    rows = np.flatnonzero(call.ended)
    for key in ("final_obs", "final_info"):
        if rows.size and not (key in call.infos and f"_{key}" in call.infos):
            raise AssertionError(
                f"same_step: row {rows[0]} ended in {call.source}, so that infos must hold {key!r} and '_{key}', "
                f"but it holds {list(call.infos)}."
            )
        mask = call.infos.get(f"_{key}", np.zeros_like(call.ended))
        if not np.array_equal(mask, call.ended):
            raise AssertionError(
                f"same_step: infos['_{key}'] of {call.source} must mask the rows that ended, {call.ended}, got {mask}."
            )
    if not rows.size:
        return {}
    final_obs = call.infos["final_obs"]
    if is_object_array(final_obs):
        final_obs = map_leaves(scalar_to_array, final_obs)
    else:  # a batch, as from torch environments
        final_obs = observation_rows(envs.observation_space, final_obs)
    for i in rows:
        if not envs.single_observation_space.contains(final_obs[i]):
            raise AssertionError(
                f"same_step: row {i} of infos['final_obs'] of {call.source} is not in single_observation_space: "
                f"{final_obs[i]}."
            )
    return {int(i): final_obs[i] for i in rows}


def check_autoreset_step(call: Call) -> None:
    """Rule "next_step": the step after an end does nothing but reset."""
    for name, values in zip(("reward", "termination", "truncation"), call.outcome, strict=True):
        bad = call.pending & (values != 0)
        if bad.any():
            raise AssertionError(
                f"next_step: row {bad.argmax()} ended before {call.source}, so that this step only resets it and its "
                f"{name} must be 0, got {values[bad][0]}."
            )
