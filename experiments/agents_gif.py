"""figures/agents.gif: agents at work, each beside its model's prediction.

    python experiments/agents_gif.py    # the agents of drawer-open and Kitchen, or of given folders

Left the best of the first five episodes that --evaluate plays, right what the model predicts after
its first five images from the actions alone.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moto
import pictures

HERE, SEEN, FRAMES = Path(__file__).resolve().parent, 5, 80


def pair(folder):
    """A run's folder -> the episode and its prediction side by side (FRAMES, 3 P, 6 P, 3)."""
    run = moto.open_run(folder, workers=1)
    seeds = (moto.episode_seed(run.cfg, "evaluation", 10_000 + index) for index in range(5))
    played = (moto.rollout(run.cfg, run.env, run.agent.ema_policy, seed) for seed in seeds)
    episode = max(played, key=lambda episode: (episode["success"], sum(episode["reward"])))
    steps = min(len(episode["reward"]), int(np.argmax(episode["reward"])) + 12)
    truth, model, *_ = pictures.open_loop(run.agent, episode, SEEN, steps - SEEN)
    run.close()
    shown = np.linspace(0, len(truth) - 1, FRAMES).astype(int)
    return np.concatenate([truth, model], 2)[shown].repeat(3, 1).repeat(3, 2)


def draw(folders):
    published = HERE / "agents/drawer-open", HERE / "agents/kitchen-partial"
    folders = folders or sys.argv[1:] or published
    frames = np.concatenate([pair(folder) for folder in folders], 2)
    colours = Image.fromarray(np.concatenate(frames[::8])).quantize(128)
    images = [Image.fromarray(frame).quantize(palette=colours, dither=0) for frame in frames]
    images[0].save(HERE / "figures/agents.gif", save_all=True, append_images=images[1:],
                     duration=[80] * (FRAMES - 1) + [1500], loop=0)


if __name__ == "__main__":
    sys.exit(moto.exit_code(draw))
