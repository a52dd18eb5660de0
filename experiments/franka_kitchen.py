"""Franka Kitchen for moto.py: the environment, its scripted demonstrator, the human data set
(--data minari:ID), and the paper's Figure 4. moto.py imports it for kitchen-partial and -mixed.

An arm is steered by nine velocities; four objects are to be put in place. A scripted demonstration
does three of the task's own four sub-tasks and another one, in varying order, so that none is worth
more than 3. Hand positions are in metres, world axes.
"""
import contextlib, hashlib, importlib.metadata, inspect, os

import numpy as np
import torch
from tqdm import tqdm

import demonstrations
import meta_world
import moto

EXTRA = ("pip install gymnasium-robotics==1.4.2 'minari[hdf5,hf]==0.5.4' (the extra for Franka "
         "Kitchen)")
OPEN, SHUT = 1.0, -1.0                                    # the action of both fingers

# Object: the site that its way-points are relative to; the way-points with what the fingers do
# there, where the work ends last; where to back off. A policy is less exact than a script, and
# later: a push goes through the middle of what was measured to work, and the kettle's does no harm
# when it is kept up.
SCRIPTS = {
    "microwave": (
        "microhandle_site",
        [((.10, -.25, 0), OPEN), ((.03, -.15, 0), OPEN), ((.03, 0, 0), OPEN), ((.03, 0, 0), SHUT),
         ((-.10, -.25, 0), SHUT), ((-.3, -.4, 0), SHUT)],
        ((.05, -.15, .1), OPEN)),
    "kettle": (
        "kettle_site",
        [((.03, -.3, -.085), SHUT), ((.03, -.2, -.085), SHUT), ((.09, .1, -.085), SHUT)],
        ((0, -.12, .05), SHUT)),
    "bottom burner": (
        "knob2_site",
        [((-.07, -.03, -.18), SHUT), ((-.07, -.03, .065), SHUT), ((.02, -.03, .045), SHUT)],
        ((0, -.15, 0), SHUT)),
    "top burner": (
        "knob4_site",
        [((-.06, -.25, .05), SHUT), ((-.06, -.03, .05), SHUT), ((.015, -.03, .03), SHUT)],
        ((0, -.15, 0), SHUT)),
    "light switch": (
        "light_site",
        [((.08, -.15, .04), OPEN), ((.08, -.02, .04), OPEN), ((-.2, .01, .04), OPEN)],
        ((.1, -.15, .05), SHUT)),
    "slide cabinet": (
        "slide_site",
        [((-.12, -.12, 0), SHUT), ((-.1, .03, 0), SHUT), ((.35, .03, 0), SHUT)],
        ((-.05, -.2, 0), SHUT)),
}


class Kitchen:
    """Franka Kitchen through the authors' camera: an arm, nine velocities, four objects to be put
    in place.

    The reward is the number of the task's four objects that are in place at that step; success is
    all four. No termination. Sources: Gupta et al. 2019; D4RL.
    """
    action_size, terminates, max_demo_reward = 9, False, 3
    view = {"azimuth": 90, "elevation": -60, "distance": 1.86, "lookat": [-0.3, 0.5, 2.0]}
    tasks = {"kitchen-partial": ("microwave", "kettle", "light switch", "slide cabinet"),
             "kitchen-mixed": ("microwave", "kettle", "bottom burner", "light switch")}

    def __init__(self, cfg):
        meta_world.need("gymnasium_robotics", EXTRA)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            import gymnasium, gymnasium_robotics          # which prints news of other robots
        gymnasium.register_envs(gymnasium_robotics)
        self.targets, self.repeat = self.tasks[cfg.task], cfg.action_repeat
        self.env = gymnasium.make("FrankaKitchen-v1", tasks_to_complete=list(self.targets),
                                  terminate_on_tasks_completed=False,
                                  remove_task_when_completed=False)
        self.env = self.env.unwrapped                     # our own time limit
        self.model, self.data = self.env.model, self.env.data
        self.camera = meta_world.Camera(cfg, self.model, self.data, self.view)
        self.render, self.cfg = self.camera.render, cfg
        self.all_four = False                             # whether scripts do the task's own four

    def describe(self):
        code = "".join(map(inspect.getsource, (draw_sequence, play_script, reach)))
        return self.camera.describe() | {
            "gymnasium-robotics": importlib.metadata.version("gymnasium-robotics"),
            "scripts": SCRIPTS, "script code": hashlib.sha256(code.encode()).hexdigest()[:12]}

    def reset(self, seed):
        self.rng, self.script, self.sequence = np.random.default_rng(seed), None, []
        self.env.reset(seed=int(self.rng.integers(2 ** 31)))
        return self.render()

    def step(self, action):
        for _ in range(self.repeat):
            _, reward, *_ = self.env.step(np.asarray(action, float))
        self.demonstrated = all(map(self.in_place, self.sequence))
        return self.render(), reward, False, False, reward == len(self.targets)

    def restore(self, observation):
        """Set a recorded observation (59,) back into the simulator -> image, reward there."""
        self.env.robot_env.set_state(np.concatenate([observation[:9], observation[18:39]]),
                                     np.concatenate([observation[9:18], observation[39:]]))
        return self.render(), float(sum(map(self.in_place, self.targets)))

    def in_place(self, name, within=0.3):
        """Whether an object is near its goal; 0.3 is what the environment itself counts."""
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env
        at = self.data.qpos[kitchen_env.OBS_ELEMENT_INDICES[name]]
        return bool(np.linalg.norm(at - kitchen_env.OBS_ELEMENT_GOALS[name]) < within)

    def scripted_action(self):
        """The next action (9,) of a scripted sequence of sub-tasks."""
        if self.script is None:
            self.sequence = [*self.targets]
            if not self.all_four:
                self.sequence = draw_sequence(self.targets, self.rng)
            self.script = play_script(self, self.sequence)
        return next(self.script)

    def score(self, rewards):
        """Rewards of episodes, a list of (L,) -> the mean of the most objects in place at once, and
        how many episodes had 0, 1, ... 4."""
        most = [int(max(reward)) for reward in rewards]
        counts = np.bincount(most, minlength=5).tolist()
        return {"completed": float(np.mean(most)), "counts": counts}

    def unseen_episode(self):
        """A scripted episode of all the task's sub-tasks, as no demonstration shows it: a dict as
        moto.rollout's."""
        self.all_four = True
        try:
            for index in range(10):
                seed = moto.episode_seed(self.cfg, "evaluation", 20_000 + index)
                image, action, reward, _ = demonstrations.demonstrate(self.cfg, self, seed)
                if max(reward) == len(self.targets):
                    action = [np.float32(a) for a in action]
                    return {"image": image, "action": action, "reward": reward}
        finally:
            self.all_four = False
        raise moto.UserError(f"10 scripted attempts at all of {self.cfg.task} failed in "
                             f"{self.cfg.episode_steps} steps; raise --episode-steps")

    def close(self):
        self.camera.close()
        self.env.close()

    def draw(self, run, path):
        return draw_combination(run, path)


def draw_sequence(targets, rng):
    """The task's own four, one replaced by a sub-task that does not count, in an order that leans
    to the task's -> a list of four names."""
    sequence, others = [*targets], [name for name in SCRIPTS if name not in targets]
    sequence[rng.integers(4)] = others[rng.integers(len(others))]
    return [sequence[i] for i in np.argsort(np.arange(4) + rng.uniform(0, 2, 4))]


def play_script(env, sequence):
    """The actions (9,) of a sequence of sub-tasks, then rest: one by one, as the scene changes.

    A sub-task ends where the hand has arrived, slowly and within a centimetre, or half as far from
    the goal as counts as in place. Where it ended in full swing, a policy late by a step would push
    on.
    """
    for name in sequence:
        site, (*way, (end, grip)), (back, fingers) = SCRIPTS[name]
        origin = env.data.site(site).xpos.copy()
        for offset, held in way:
            yield from reach(env, origin + offset, held, 0.08)
        done = lambda: env.in_place(name, 0.15)
        yield from reach(env, origin + end, grip, 0.055, 0.01, done)
        hand = env.data.site("end_effector").xpos
        yield from reach(env, hand + back, fingers, 0.08, most=12)
    while True:
        yield np.zeros(9)


def reach(env, target, fingers, speed, near=0.03, done=lambda: False, most=40):
    """Actions towards a point (3,), at `speed` m a step, until within `near` m of it or done().

    Damped least squares for the seven joints, a twentieth of the way back to the first posture in
    what that leaves free, and near the target an integral term: the joints sag. Fingers get four
    steps.
    """
    import mujoco
    model, data = env.model, env.data
    jacobian, error, missed = np.zeros((3, model.nv)), np.full(3, np.inf), np.zeros(3)
    for step in range(most):
        if (step >= 4 and np.linalg.norm(error) < near) or done():
            return
        error = target - data.site("end_effector").xpos
        length = np.linalg.norm(error)
        missed = missed + error if length < 0.08 else np.zeros(3)
        wanted = (error + 0.1 * missed) * min(1, speed / length)
        mujoco.mj_jacSite(model, data, jacobian, None, data.site("end_effector").id)
        J = jacobian[:, :7]
        inverse = J.T @ np.linalg.inv(J @ J.T + 1e-3 * np.eye(3))
        posture = env.env.robot_env.init_qpos[:7] - data.qpos[:7]
        joints = inverse @ wanted + (np.eye(7) - inverse @ J) @ (0.05 * posture)
        action = np.append(2.2 / 0.16 * joints, [fingers, fingers])        # 0.16: a step at 1
        yield np.clip(action, -1, 1)


def render_minari(cfg, workers):
    """--data minari:ID: a recorded data set of Franka Kitchen's states, rendered anew -> paths of
    episodes, cached. Raises moto.UserError where it is missing, damaged, or for another robot."""
    if cfg.task not in Kitchen.tasks:
        raise moto.UserError(f"--data minari: is for {' and '.join(Kitchen.tasks)}; {cfg.task} "
                             "takes a folder of .npz episodes")
    meta_world.need("minari", EXTRA)
    import minari
    name = cfg.data.removeprefix("minari:")
    try:
        data = minari.load_dataset(name, download=True)
        recorded = [(episode.observations, episode.actions) for episode in data.iterate_episodes()]
    except Exception as error:                            # network, files, versions
        raise moto.UserError(f"the Minari data set {name!r} cannot be read "
                             f"({type(error).__name__}: {error}); remove it and fetch it anew, as "
                             "by: minari download D4RL/kitchen/mixed-v2") from None
    recorded = [(seen.get("observation") if isinstance(seen, dict) else seen, actions)
                for seen, actions in recorded]
    for states, actions in recorded:
        arrays = isinstance(states, np.ndarray) and isinstance(actions, np.ndarray)
        if not (arrays and states.shape == (len(actions) + 1, 59) and actions.shape[1:] == (9,)
                and states.dtype.kind == actions.dtype.kind == "f"
                and np.isfinite(states).all() and np.isfinite(actions).all()):
            states, actions = (f"{v.dtype} {v.shape}" if isinstance(v, np.ndarray)
                               else type(v).__name__ for v in (states, actions))
            raise moto.UserError(f"the Minari data set {name!r} has observations {states} and "
                                 f"actions {actions}; Franka Kitchen has finite floats (L+1, 59) "
                                 "and (L, 9): choose another data set")
    ingredients = {"minari": name, "episodes": len(recorded)}
    folder = demonstrations.cache_folder(cfg, workers.env, ingredients)
    paths = [folder / f"episode{index:04d}.npz" for index in range(len(recorded))]
    missing = [(path, *pair) for path, pair in zip(paths, recorded) if not path.exists()]
    rendered = workers.each(render_recorded, missing)
    for _ in tqdm(rendered, total=len(missing), desc="rendering", disable=not missing):
        moto.exit_if_asked()
    return paths


def render_recorded(cfg, env, recorded):
    """Render one recorded episode (path, states (L+1, 59), actions (L, 9)) to its path."""
    path, states, actions = recorded
    env.reset(0)
    images, rewards = zip(*map(env.restore, states))
    moto.save_episode(path, images, np.clip(actions, -1, 1), rewards[1:])


@torch.no_grad()
def draw_combination(run, path, dreams=64, steps=200):
    """The paper's Figure 4: does the model know what it has never seen, all four in place?

    Above: a scripted episode of all four, filtered; the model's reward for it against the true one.
    Below: the policy's own dreams from that first image, without its noise: `dreams` of them, which
    differ in the latents drawn, and frames of the most rewarded one. Returns the largest predicted
    reward of each: {"predicted_unseen", "dreamt"}.
    """
    import pictures
    agent, env = run.agent, run.env
    model, episode = agent.model, env.unseen_episode()
    e, a, is_first = pictures.as_sequence(agent, episode)
    h, z, *_ = (v[0] for v in model.observe(e, a, is_first))
    predicted = model.expected_reward(torch.cat([h, z], -1)).cpu()
    first = [value.repeat(dreams, 1) for value in (h[:1], z[:1], e[0, :1])]
    policy, hold = agent.ema_policy, run.cfg.hold
    dream = moto.imagine(model, policy, policy.actor, *first, steps // hold, hold)["feat"]
    dreamt = model.expected_reward(dream).cpu()           # (steps + 1, dreams)
    best = int(dreamt.amax(0).argmax())
    fig, axes = pictures.figure(13, 8, 4, 1, height_ratios=[1, 1.6, 1, 1.6])
    for axis, images, title in (
            (axes[0], np.stack(episode["image"]),
             "a scripted episode of all four sub-tasks, as no demonstration shows it"),
            (axes[2], moto.to_uint8(model.decoder(dream[:, best])),
             "the policy's most rewarded dream from that first image")):
        shown = np.linspace(0, len(images) - 1, 12).astype(int)
        axis.imshow(np.concatenate(images[shown], 1))
        axis.set(xticks=(np.arange(12) + 0.5) * images.shape[2], yticks=[])
        axis.set_xticklabels(shown)
        axis.set_title(title, fontsize=10)
    axes[1].plot([0, *episode["reward"]], color="black", label="true reward: objects in place")
    axes[1].plot(predicted, color="tab:green", label="the model's")
    axes[3].plot(dreamt, color="tab:green", lw=0.6, alpha=0.5)
    axes[3].plot(dreamt[:, best], color="black",
                 label=f"the model's, in {dreams} dreams (black: this one)")
    for axis in (axes[1], axes[3]):
        axis.axhline(env.max_demo_reward, color="tab:red", ls=":",
                     label="the most in any demonstration")
        axis.set(ylim=(-0.3, 4.5), xlabel="agent step")
        axis.legend(fontsize=8, loc="upper left")
    pictures.save_figure(fig, path)
    return {"predicted_unseen": float(predicted.max()), "dreamt": float(dreamt.max())}
