"""What a trained MOTO agent lacks: is it the critics, the model's disagreement, or the actor?

    python experiments/diagnose.py runs/coffee-push-moto-seed0            # 40 fresh episodes
    python experiments/diagnose.py runs/coffee-push-moto-seed0 --episodes 100

- Critics: the area under the ROC curve (AUC) of their value, at a step, as a prediction of whether
  the episode will succeed after it: 1 they know, 0.5 they guess. Only episodes that have not
  succeeded before that step count.
- Disagreement: the AUC with which u tells other actions from the executed ones, at the same states:
  uniform ones (off the data), and those of other corrections within the bound (all that the actor
  can choose). Where the second is near 0.5 the penalty cannot guide the actor.
- Actor, critics and penalty: the latest training metrics.

Axes and letters as in moto.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moto
import pictures


def auc(positive, negative):
    """The probability that a number of `positive` is larger than one of `negative`, ties counted
    half; nan where one is empty."""
    if not len(positive) or not len(negative):
        return float("nan")
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


@torch.no_grad()
def disagreements(agent, episode, rng):
    """u (L,) along an episode under three actions at each state: the executed one, a uniform one,
    and the executed one plus another correction within the bound."""
    model, bound = agent.model, agent.cfg.bound
    e, a, is_first = pictures.as_sequence(agent, episode)
    h, z, *_ = (value[0, :-1] for value in model.observe(e, a, is_first))
    executed = a[0, 1:]
    noise = [torch.as_tensor(rng.uniform(-1, 1, executed.shape).astype(np.float32)).to(a.device)
             for _ in range(2)]
    choices = executed, noise[0], (executed + bound * noise[1]).clamp(-1, 1)
    return [moto.disagreement(model.prior(model.recurrence(h, z, choice))[0]).cpu().numpy()
            for choice in choices]


def diagnose(run, episodes):
    """Play fresh episodes -> dict: success; AUC of the critics by step; of the disagreement."""
    cfg, agent, rng = run.cfg, run.agent, np.random.default_rng(0)
    seeds = [moto.episode_seed(cfg, "evaluation", 30_000 + index) for index in range(episodes)]
    values, first_success, u = [], [], [[], [], []]
    for episode in run.workers.play(agent.ema_policy, seeds):
        values.append(agent.values(np.stack(episode["image"])).cpu().numpy())
        reward = np.array([0, *episode["reward"]])
        first_success.append(int(reward.argmax()) if episode["success"] else np.inf)
        for column, value in zip(u, disagreements(agent, episode, rng)):
            column.append(value)
        moto.exit_if_asked()
    first_success, by_step = np.array(first_success), {}
    for step in range(0, cfg.episode_steps, max(1, cfg.episode_steps // 10)):
        going = first_success > step
        now = np.array([value[min(step, len(value) - 1)] for value in values])
        later = np.isfinite(first_success)
        by_step[step] = auc(now[going & later], now[going & ~later])
    executed, uniform, corrected = (np.concatenate(column) for column in u)
    return {"success": float(np.isfinite(first_success).mean()), "critic_auc": by_step,
            "uniform_auc": auc(uniform[::7], executed[::7]),
            "correction_auc": auc(corrected[::7], executed[::7])}


def report(result, rows):
    """The result and the latest metrics as lines of text."""
    lines = [f"success {result['success']:.0%}", "AUC of the critics, by step: " + ", ".join(
        f"{step}: {value:.2f}" for step, value in result["critic_auc"].items())]
    lines.append(f"AUC of the disagreement: uniform actions {result['uniform_auc']:.2f}, other "
                 f"corrections {result['correction_auc']:.2f}")
    latest = {}
    for row in rows:
        latest |= row
    names = [name for name in latest if name.startswith(("actor/", "critic/", "imagined/"))]
    return lines + [f"{name} {latest[name]:.4g}" for name in sorted(names)]


def command(argv):
    parser = argparse.ArgumentParser(prog="diagnose.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("logdir")
    parser.add_argument("--episodes", type=int, default=40)
    given = parser.parse_args(argv)
    if given.episodes < 1:
        raise moto.UserError(f"--episodes is {given.episodes} but must be at least 1")
    run = moto.open_run(given.logdir)
    try:
        if not isinstance(run.agent, moto.MOTO):
            raise moto.UserError(f"{given.logdir} holds {run.cfg.variant}, which has no world "
                                 "model to diagnose; give a run of moto or of one of its ablations")
        result = diagnose(run, given.episodes)
        print("\n".join(report(result, moto.read_metrics(run.dir / "metrics.jsonl"))))
    finally:
        run.close()


def main(argv=None):
    return moto.exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
