"""The pictures that a run of moto.py leaves: curve.png, prediction.png, eval.gif. moto.py imports
this file when a run begins, so that its source is kept."""
import contextlib
import sys

import numpy as np
import torch

import moto


@contextlib.contextmanager
def decorative(what):
    """For pictures, which nobody should lose a run for: an error inside becomes one line."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"note: no {what} ({reason})", file=sys.stderr)


def as_sequence(agent, episode):
    """An episode as one sequence for WorldModel.observe: e (1, T, E), a (1, T, A), is_first
    (1, T)."""
    e = agent.ema_policy.encode(np.stack(episode["image"]))[None]
    a = np.stack([np.zeros_like(episode["action"][0]), *episode["action"]])
    is_first = torch.arange(e.shape[1], device=agent.device)[None] == 0
    return e, torch.as_tensor(a, device=agent.device)[None], is_first


@torch.no_grad()
def open_loop(agent, episode, seen, steps):
    """Filter the first `seen` images, then predict `steps` more from the actions alone.

    Returns the true and the model's images, uint8 (T, P, P, 3), disagreement u (T,) in units of its
    mean on the data (zero where images are seen) and predicted reward (T,). In each step z is the
    mean of the K means."""
    model, (e, a, is_first) = agent.model, as_sequence(agent, episode)
    T = min(seen + steps, e.shape[1])
    h, z, *_ = (v[0] for v in model.observe(e[:, :seen], a[:, :seen], is_first[:, :seen]))
    feats, u = [torch.cat([h, z], -1)], [torch.zeros(seen)]
    h, z = h[-1:], z[-1:]
    for t in range(seen, T):
        h = model.recurrence(h, z, a[:, t])
        means, _ = model.prior(h)
        z = means.mean(0)
        feats.append(torch.cat([h, z], -1))
        u.append((moto.disagreement(means) / (model.disagreement_mean or 1)).cpu())
    feats = torch.cat(feats)
    reward = model.expected_reward(feats).cpu().numpy()
    truth, predicted = np.stack(episode["image"][:T]), moto.to_uint8(model.decoder(feats))
    return truth, predicted, torch.cat(u).numpy(), reward


def figure(width, height, *shape, **kwargs):
    """A matplotlib figure (inches) and its axes, without pyplot: no window, no global state."""
    from matplotlib.figure import Figure
    fig = Figure((width, height), layout="constrained")
    return fig, fig.subplots(*shape, **kwargs)


def save_figure(fig, path):
    moto.write_atomically(path, lambda file: fig.savefig(file, format="png", dpi=100))


def draw_run(run):
    """All pictures of a finished run, into its folder."""
    cfg, agent, folder = run.cfg, run.agent, run.dir
    with decorative("curve.png"):
        draw_curve(cfg, moto.read_metrics(folder / "metrics.jsonl"), folder / "curve.png")
    with decorative("pictures of episodes"):
        if run.videos is None:                            # resumed after the last evaluation
            _, run.videos = moto.evaluate(cfg, run.workers, agent, min(4, cfg.final_episodes))
        write_gif(agent, run.videos, folder / "eval.gif")
        if isinstance(agent, moto.MOTO):
            shown = max(run.videos, key=lambda episode: episode["success"])    # the first, if any
            draw_prediction(agent, shown, folder / "prediction.png")
    draw_own(run, "combination.png")


def draw_evaluation(run, videos):
    """evaluate.gif and the environment's own picture -> dict of the numbers that go with it."""
    with decorative("evaluate.gif"):
        write_gif(run.agent, videos, run.dir / "evaluate.gif")
        print(f"wrote {run.dir / 'evaluate.gif'}", file=sys.stderr)
    return draw_own(run, "evaluate-combination.png")


def draw_own(run, name):
    """The environment's own picture, where it has one and the agent a model -> dict of its
    numbers."""
    numbers = {}
    if isinstance(run.agent, moto.MOTO) and hasattr(run.env, "draw"):
        with decorative(name):
            numbers = run.env.draw(run, run.dir / name)
            print(f"wrote {run.dir / name}", file=sys.stderr)
    return numbers


def draw_prediction(agent, episode, path, steps=44, every=4):
    """prediction.png: truth, open-loop prediction, error; disagreement and reward per step. The
    first success, if there is one, happens in the prediction."""
    rewards, L = np.array([0, *episode["reward"]]), len(episode["reward"])
    success = int(rewards.argmax()) if rewards.any() else L
    seen = max(min(success - 2 * steps // 3, L - steps), min(5, L))
    truth, model, u, reward = open_loop(agent, episode, seen, steps)
    shown = np.arange(max(seen - 5, 0), len(truth), every)
    error = np.abs(truth.astype(int) - model).mean(-1)
    width, extent = max(1.05 * len(shown) + 1, 9), (shown[0] - every / 2, shown[-1] + every / 2)
    fig, axes = figure(width, 6.2, 4, 1, height_ratios=[1, 1, 1, 1.7], sharex=True)
    for axis, name, images in zip(axes, ("truth", "model", "|error|"), (truth, model, error)):
        strip = np.concatenate(images[shown], 1)
        axis.imshow(strip, "magma", vmin=0, vmax=128, extent=(*extent, 0, 1), aspect="auto")
        axis.axvline(seen - 0.5, color="white", lw=2)
        axis.set(yticks=[], ylabel=name)
    t, predicted = np.arange(shown[0], len(truth)), np.arange(seen, len(truth))
    axis = axes[3]
    axis.plot(t, rewards[t], color="black", label="true reward")
    axis.plot(t, reward[t], color="tab:green", label="model's reward")
    axis.plot(predicted, u[predicted], ".-C3", label="disagreement u (1: its mean on the data)")
    axis.axvspan(extent[0], seen - 0.5, color="tab:blue", alpha=0.15, label="images are seen")
    axis.margins(y=0.3)
    axis.set(xticks=shown, xlim=extent, xlabel="agent step (after the white line: no images)")
    axis.legend(fontsize=8, loc="upper left", ncols=4)
    axes[0].set_title("Open-loop video prediction of an episode it was not trained on", fontsize=10)
    save_figure(fig, path)


@torch.no_grad()
def write_gif(agent, episodes, path, fps=15):
    """Episodes side by side, above the model's reconstructions (where there is a model), until 20
    steps after the last of them first earns its largest reward."""
    import imageio.v3 as imageio
    ends = [int(np.argmax(e["reward"])) if e["success"] else len(e["image"]) for e in episodes]
    columns = []
    for episode in episodes:
        columns.append(np.stack(episode["image"]))
        if isinstance(agent, moto.MOTO):
            h, z, *_ = agent.model.observe(*as_sequence(agent, episode))
            model = agent.model.decoder(torch.cat([h, z], -1)[0])
            columns[-1] = np.concatenate([columns[-1], moto.to_uint8(model)], 1)
    longest = max(map(len, columns))
    columns = [np.concatenate([c, np.repeat(c[-1:], longest - len(c), 0)]) for c in columns]
    frames = np.concatenate(columns, 2)[:20 + max(ends):2].repeat(2, 1).repeat(2, 2)
    gif = imageio.imwrite("<bytes>", frames, extension=".gif", duration=2000 / fps, loop=0)
    moto.write_atomically(path, lambda file: file.write(gif))


def running_mean(values, width=10):
    return [np.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


CURVES = {                                                # panel: metric, line, label
    "success rate": [
        ("evaluation/success", "o-C0", "evaluation"),
        ("evaluation/completed", "s--C2", "evaluation: objects in place / 4")],
    "in units of 1 / (1 - gamma)": [
        ("evaluation/return", "o-C0", "real return from the start"),
        ("evaluation/infinite_horizon_return", "o--C0", "the same, its last reward going on"),
        ("evaluation/value_estimate", "s--C3", "the critics' estimate of it"),
        ("critic/q", "-C4", "value of the data's decisions, Q"),
        ("imagined/reward", "-C2", "imagined reward per step")],
    "losses of model (nats per step) and critics": [
        (name, "", name) for name in ("model/image", "model/kl", "model/reward", "model/feature",
                                      "model/continuation", "critic/real", "critic/imagined")],
    "prior (nats per action) and actor": [
        ("prior/behaviour_nll", "-C5", "-ln b(demonstrated action), Eq 13"),
        ("actor/correction", "-C1", "mean size of the correction, in units of its bound")]}


def draw_curve(cfg, rows, path):
    """curve.png of one run: success, estimated and real return, losses, the policy."""
    def column(name):
        return np.array([(r["updates"], r[name]) for r in rows if name in r]).reshape(-1, 2).T
    fig, axes = figure(11, 7, 2, 2, sharex=True)
    x, y = column("episode/success")
    label = "online episodes (half with noise; mean of 10)"
    axes[0, 0].plot(x, running_mean(y), "-C1", label=label)
    for axis, (ylabel, lines) in zip(axes.flat, CURVES.items()):
        for name, line, label in lines:
            x, y = column(name)
            if y.size:
                axis.plot(x, y / 4 if name == "evaluation/completed" else y, line, label=label)
        axis.set(ylabel=ylabel)
        axis.axvline(moto.planned_offline(cfg), color="black", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    axes[0, 0].set(ylim=(-0.03, 1.03))
    axes[1, 0].set(yscale="log", xlabel="updates")
    axes[1, 1].set(xlabel="updates")
    fig.suptitle(f"{cfg.task}, {cfg.variant}, seed {cfg.seed} (dotted line: the first online "
                 "episode)")
    save_figure(fig, path)
