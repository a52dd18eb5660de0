"""A task that trains in seconds: a blob is to be moved onto a disk. The walkthrough tells its
story on it.

    python experiments/toy.py                  # each of AGENTS, three seeds: a quarter of an hour
    python experiments/toy.py --seeds 0 --agents cloning

Writes experiments/figures/toy.json, which the walkthrough reads.

The demonstrator goes the right way, but dawdles, and always starts on the right-hand side. The
agent has to start anywhere: on the left nobody ever was. Axes and letters as in moto.py.
"""
import argparse, itertools, json, sys
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moto

FILE = Path(__file__).resolve().parent / "figures/toy.json"
STEPS, RADIUS = 12, 0.25                                # of an episode; of the disk
SETTINGS = dict(
    task="gym:walkthrough/Dot-v0", device="cpu", precision="float32", workers=1, image_size=16,
    action_repeat=1, episode_steps=STEPS, batch=8, length=8, channels=8, deter=64, stoch=8,
    hidden=64, ensemble=3, model_lr=3e-3, actor_lr=1e-3, critic_lr=2e-3, gamma=0.9, hold=2,
    horizon=2, bound=0.4, alpha=1.0, shift=0, reward_head="bernoulli", offline_updates=300,
    online_episodes=40, updates_per_episode=15, warmup=5)
AGENTS = {
    "cloning": dict(variant="bc"),
    "dreams alone, alpha = 0": dict(variant="dreamerv2"),
    "dreams alone, alpha = 1": dict(variant="dreamerv2", alpha=1.0),
    "real steps first, alpha = 0": dict(variant="no-bc-no-unc"),
    "real steps first, alpha = 1": dict(variant="no-bc"),
    "moto": {},
    "moto, c = 0.1": dict(bound=0.1),
    "moto, c = 1": dict(bound=1.0),
    "moto, alpha = 0": dict(alpha=0.0),
    "moto, alpha = 3": dict(alpha=3.0),
    "moto, H = 0": dict(horizon=0),
    "moto, H = 5": dict(horizon=5),
}


class Dot(gymnasium.Env):
    """A blob at p in [-1, 1]^2, moved by actions in [-1, 1]^2; reward 1 on the disk."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.p = 0.85 * np.array([np.cos(angle), np.sin(angle)])
        return self.p.astype(np.float32), {}

    def step(self, action):
        self.p = np.clip(self.p + 0.2 * np.asarray(action), -1, 1)
        inside = bool(np.linalg.norm(self.p) < RADIUS)
        return self.p.astype(np.float32), float(inside), False, False, {"success": inside}

    def render(self):
        y, x = np.mgrid[0:16, 0:16] / 7.5 - 1
        blob = np.exp(-((x - self.p[0]) ** 2 + (y - self.p[1]) ** 2) / 0.3)
        return (255 * np.stack([blob, (np.hypot(x, y) < RADIUS) * 0.5, blob], -1)).astype(np.uint8)


gymnasium.register("walkthrough/Dot-v0", Dot)


def make():
    """The task, as moto.py sees it."""
    return moto.make_env(moto.build_config(**SETTINGS))


def demonstrate(env, count=12):
    """`count` episodes, as on disk, of a slow and noisy demonstrator that starts on the right and
    arrives."""
    episodes, seeds = [], itertools.count()
    while len(episodes) < count:
        seed = next(seeds)
        g, image = np.random.default_rng(seed), env.reset([1, 0, seed])
        images, actions, rewards, blob = [image], [], [], env.env.unwrapped
        if blob.p[0] < 0:
            continue
        for _ in range(STEPS):
            way = -0.35 * blob.p / max(np.linalg.norm(blob.p), 0.2)
            actions.append(np.clip(way + 0.3 * g.standard_normal(2), -1, 1))
            image, reward, *_ = env.step(actions[-1])
            images.append(image), rewards.append(reward)
        if any(rewards):
            episodes.append({"image": np.stack(images), "terminal": False,
                             "action": np.array(actions, np.float32),
                             "reward": np.array(rewards, np.float32)})
    return episodes


def where(images):
    """The blob's place (x, y), each (T,), from the brightness of images (T, 16, 16, 3)."""
    light = np.stack(images)[..., 0].astype(float) ** 4
    y, x = np.mgrid[0:16, 0:16] / 7.5 - 1
    return (light * x).sum((1, 2)) / light.sum((1, 2)), (light * y).sum((1, 2)) / light.sum((1, 2))


def infinite_return(reward):
    """The discounted return, its last reward going on for ever, as critics see it: 1 where every
    step is rewarded."""
    gamma = SETTINGS["gamma"]
    discounted = (1 - gamma) * sum(gamma ** t * r for t, r in enumerate(reward))
    return discounted + gamma ** len(reward) * reward[-1]


def train(env, demonstrations, seed=0, **changes):
    """Both phases, in the open -> learner, metrics of every update, and the thirty evaluation
    episodes after each phase."""
    variant = moto.VARIANTS[changes.get("variant", "moto")]            # its numbers over SETTINGS
    cfg = moto.build_config(**SETTINGS | variant | {"seed": seed} | changes)
    rng, metrics, played = np.random.default_rng(seed), [], []
    replay = moto.Replay((STEPS + 1) * (len(demonstrations) + cfg.online_episodes), 16, 2)
    for episode in demonstrations:
        replay.add(episode)
    learner = moto.make_agent(cfg, 2, False, "cpu")
    evaluate = lambda: [moto.rollout(cfg, env, learner.ema_policy, [seed, 2, index])
                        for index in range(30)]

    def learn(updates):
        for _ in range(updates):
            metrics.append(learner.update(moto.sample_batch(cfg, rng, replay)))
    learn(cfg.offline_updates)
    if learner.stages == 2:
        replay.encode(learner.ema_policy)
        learn(cfg.offline_updates)
    played.append(evaluate())
    for index in range(cfg.online_episodes):
        noisy = index % 2 == 0
        episode = moto.rollout(cfg, env, learner.ema_policy, [seed, 1, index], sample=noisy)
        learner.episodes += 1
        learner.failures += not episode.pop("success")
        episode = {name: np.array(value) for name, value in episode.items()}
        replay.add(episode | {"terminal": False}, part="online")
        if learner.stages == 2:
            replay.encode(learner.ema_policy)
        learn(cfg.updates_per_episode)
    played.append(evaluate() if cfg.online_episodes else played[0])
    return learner, metrics, played


def measure(learner, played):
    """Of the episodes after each phase: mean return of those that started on the left and on the
    right, and what the critics promised for the latter phase's -> dict of floats."""
    result = {}
    for phase, episodes in zip(("offline", "online"), played):
        left = np.array([where(e["image"][:1])[0][0] < 0 for e in episodes])
        real = np.array([infinite_return(e["reward"]) for e in episodes])
        result |= {f"{phase}_left": real[left].mean(), f"{phase}_right": real[~left].mean(),
                   phase: real.mean()}
    if learner.value_estimate:
        promised = np.array([learner.value_estimate(e["image"][0]) for e in episodes])
        result |= {"promised_left": promised[left].mean(),
                   "promised_right": promised[~left].mean()}
    return {name: round(float(value), 4) for name, value in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    env = make()
    demonstrations = demonstrate(env)
    for name in args.agents:
        for seed in args.seeds:
            learner, _, played = train(env, demonstrations, seed, **AGENTS[name])
            table.setdefault(name, {})[str(seed)] = row = measure(learner, played)
            print(name, seed, row, flush=True)
            FILE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
