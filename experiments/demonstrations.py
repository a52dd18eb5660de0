"""Scripted demonstrations for moto.py, made once and kept. moto.py imports it on demand."""
import hashlib
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

import moto

DEMO_TAIL = 10              # agent steps that a demonstration goes on after its first success


def demonstrate(cfg, env, seed):
    """One scripted episode -> lists of image, action, reward, and whether it succeeded.

    Noise is added to the clipped scripted action; the sum, clipped again, is executed and recorded.
    It goes on for DEMO_TAIL steps after the first success, to show that the reward lasts."""
    rng, after = np.random.default_rng(seed), 0
    images, actions, rewards = [env.reset(seed)], [], []
    while len(actions) < cfg.episode_steps and after <= DEMO_TAIL:
        noise = cfg.demo_noise * rng.standard_normal(env.action_size)
        actions.append(np.clip(env.scripted_action() + noise, -1, 1))
        image, reward, *_ = env.step(actions[-1])
        images.append(image)
        rewards.append(reward)
        after += bool(env.demonstrated or after)
        moto.exit_if_asked()
    return images, actions, rewards, after > 0 and max(rewards) <= env.max_demo_reward


def cache_folder(cfg, env, ingredients):
    """The folder in cfg.cache for episodes made from `ingredients` by this environment."""
    ingredients = ingredients | env.describe() | {
        "numpy": np.__version__, "layout": 1, "task": cfg.task, "image_size": cfg.image_size,
        "action_repeat": cfg.action_repeat}
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cfg.cache) / f"{cfg.task}-{digest}"
    moto.write_json(folder / "ingredients.json", ingredients)
    return folder


def collect_demos(cfg, workers):
    """Successful scripted demonstrations -> their paths, in a folder named after all that decides
    them. A collection that was interrupted continues. Raises moto.UserError where the scripted
    policy hardly ever succeeds."""
    if not hasattr(workers.env, "scripted_action"):
        raise moto.UserError(f"{cfg.task} has no scripted policy; give your own episodes: --data "
                             "DIR")
    names = "seed", "demos", "demo_noise", "episode_steps"
    ingredients = {name: getattr(cfg, name) for name in names} | {"demo_tail": DEMO_TAIL}
    folder = cache_folder(cfg, workers.env, ingredients)
    paths = sorted(folder.glob("attempt*.npz"))[:cfg.demos]
    if len(paths) == cfg.demos:
        return paths
    most = 10 * cfg.demos + 20
    attempts = range(int(paths[-1].stem[-4:]) + 1 if paths else 0, most)
    seeds = [moto.episode_seed(cfg, "demos", index) for index in attempts]
    with tqdm(total=cfg.demos, initial=len(paths), desc="demonstrations") as bar:
        for attempt, (*episode, success) in zip(attempts, workers.each(demonstrate, seeds)):
            if success:
                paths.append(folder / f"attempt{attempt:04d}.npz")
                moto.save_episode(paths[-1], *episode)
                bar.update()
            moto.exit_if_asked()
            if len(paths) == cfg.demos:
                return paths
    raise moto.UserError(f"only {len(paths)} of {most} scripted attempts at {cfg.task} succeeded "
                         f"in {cfg.episode_steps} steps; raise --episode-steps or lower "
                         "--demo-noise")
