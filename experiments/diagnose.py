"""What a trained MOTO agent lacks: is it the critics, the model's disagreement, or the actor?

    python experiments/diagnose.py runs/coffee-push-moto-seed0            # 40 fresh episodes
    python experiments/diagnose.py runs/coffee-push-moto-seed0 --episodes 100

- Critics: the area under the ROC curve (AUC) of their value, at a step, as a prediction of whether
  the episode will succeed after it: 1 they know, 0.5 they guess. Only episodes that have not
  succeeded before that step count.
- Disagreement: u, its mean over the k steps of a decision, tells other decisions from the executed
  actions: one uniform action, held (off the data), and the executed actions with another correction
  within the bound, held (all that the actor can choose). Two figures each: the AUC over all states,
  and the share of states where u is higher than for the executed actions from the same state. Where
  the share for corrections is near a half the penalty cannot guide the actor.
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
    """u under three decisions of k steps from each of an episode's states but the last k - 1, its
    mean over those steps: the executed actions, one uniform action, and the executed ones plus
    another correction within the bound -> (3, L - k + 1)."""
    model, cfg = agent.model, agent.cfg
    e, a, is_first = pictures.as_sequence(agent, episode)
    h, z, *_ = (value[0, :-cfg.hold] for value in model.observe(e, a, is_first))
    executed = a[0, 1:].unfold(0, cfg.hold, 1).movedim(-1, 0)                       # (k, N, A)
    uniform, correction = (torch.as_tensor(rng.uniform(-1, 1, executed.shape[1:]), device=a.device,
                                           dtype=a.dtype).expand_as(executed) for _ in range(2))
    means = []
    for actions in executed, uniform, (executed + cfg.bound * correction).clamp(-1, 1):
        state, us = (h, z), []
        for action in actions:
            deterministic = model.recurrence(*state, action)
            heads = model.prior(deterministic)[0]
            state = deterministic, heads.mean(0)
            us.append(moto.disagreement(heads))
        means.append(torch.stack(us).mean(0))
    return torch.stack(means).cpu().numpy()


def diagnose(run, episodes):
    """Play fresh episodes -> dict: success; AUC of the critics by step; of the disagreement."""
    cfg, agent, rng = run.cfg, run.agent, np.random.default_rng(0)
    seeds = [moto.episode_seed(cfg, "evaluation", 30_000 + index) for index in range(episodes)]
    values, first_success, u = [], [], []
    for episode in run.workers.play(agent.ema_policy, seeds):
        values.append(agent.values(np.stack(episode["image"])).cpu().numpy())
        reward = np.array([0, *episode["reward"]])
        first_success.append(int(reward.argmax()) if episode["success"] else np.inf)
        u.append(disagreements(agent, episode, rng))
        moto.exit_if_asked()
    first_success, by_step = np.array(first_success), {}
    for step in range(0, cfg.episode_steps, max(1, cfg.episode_steps // 10)):
        going = first_success > step
        now = np.array([value[min(step, len(value) - 1)] for value in values])
        later = np.isfinite(first_success)
        by_step[step] = auc(now[going & later], now[going & ~later])
    executed, uniform, corrected = np.concatenate(u, 1)
    others = {"uniform": uniform, "correction": corrected}
    return {"success": float(np.isfinite(first_success).mean()), "critic_auc": by_step,
            "u_auc": {name: auc(other[::7], executed[::7]) for name, other in others.items()},
            "u_higher": {name: float((other > executed).mean()) for name, other in others.items()}}


def report(result, rows):
    """The result and the latest metrics as lines of text."""
    lines = [f"success {result['success']:.0%}", "AUC of the critics, by step: " + ", ".join(
        f"{step}: {value:.2f}" for step, value in result["critic_auc"].items())]
    lines += [f"disagreement over a decision, {name}: AUC {result['u_auc'][name]:.2f}, higher than "
              f"for the executed actions at {result['u_higher'][name]:.0%} of the states"
              for name in result["u_auc"]]
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
